"""The embedded default: a task with exact scoring, rows made from a seed, and the recipe that learns it.

The task is the one every small business has: an order in free text becomes JSON. Held-out sentences are built from
patterns that no training row uses, so a right answer is not a remembered one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from myna.recipe import Recipe, build_recipe
from myna.run import write_text

SYSTEM = "Turn the order into JSON."
NUM_TRAIN, NUM_TEST, SEED = 400, 100, 20

FIRST = (
    "Anna Ben Clara Dmitri Elif Farah Goran Hana Ivan Julia Kofi Lena Marco Nadia Omar Priya Quentin Rosa Sven Tariq "
    "Uma Viktor Wanda Ximena Yusuf Zoe Amir Bianca Carlos Dalia Emeka Freya Giulia Hassan Ingrid Jonas Kenji Leila"
).split()
LAST = (
    "Adler Berg Costa Dahl Engel Fontaine Garcia Haddad Ivanov Jensen Kaya Lindqvist Moreau Novak Okafor Petrov Quist "
    "Rossi Sato Tanaka Ueda Vargas Weber Xu Yilmaz Zeman Abbas Brandt Cohen Duarte Eriksen Farouk Greco Hansen"
).split()
ITEMS = (
    "office chair|office chairs;desk lamp|desk lamps;water bottle|water bottles;garden hose|garden hoses;"
    "coffee mug|coffee mugs;wool blanket|wool blankets;steel shelf|steel shelves;paint roller|paint rollers;"
    "candle|candles;notebook|notebooks;bicycle pump|bicycle pumps;yoga mat|yoga mats;tea towel|tea towels;"
    "cutting board|cutting boards;phone case|phone cases;wall clock|wall clocks;picture frame|picture frames;"
    "rain jacket|rain jackets;flower pot|flower pots;door mat|door mats;lunch box|lunch boxes;ceramic bowl|ceramic bowls;"
    "storage crate|storage crates;extension cord|extension cords;camping stove|camping stoves;hiking sock|hiking socks;"
    "bar stool|bar stools;pillow case|pillow cases;tool belt|tool belts;whiteboard|whiteboards"
)
CITIES = (
    "Oslo Lisbon Cairo Gent Turin Kyoto Lima Nairobi Prague Quito Riga Seville Tunis Utrecht Vienna Warsaw Zagreb Athens "
    "Bergen Cork Dakar Essen Fez Graz Hanoi Izmir Jakarta Krakow Leeds Malmo Naples Oporto Porto Split"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBER_WORDS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()

# {n} quantity, {i} item, {c} customer, {p} place, {d} day. No pattern of one list is in the other.
TRAIN_PATTERNS = (
    "{c} from {p} wants {n} {i} by {d}.",
    "Please send {n} {i} to {c} in {p} on {d}.",
    "Order: {n} x {i}, customer {c}, ship to {p}, delivery {d}.",
    "Hi, this is {c}. I'd like {n} {i} delivered to {p} on {d}, thanks!",
    "{n} {i} for {c}, {p}, {d}",
    "On {d} we need {n} {i} at our {p} office. Ask for {c}.",
    "Could {c} get {n} {i} in {p} before {d}?",
    "{p}: {c} ordered {n} {i}, due {d}.",
    "I am {c} and I live in {p}. Bring me {n} {i} this {d}.",
    "New order from {c} ({p}): {n} {i}. Delivery day: {d}.",
    "We spoke on the phone. It's {n} {i} for {p}, {d}, name {c}.",
    "Deliver on {d}: {n} {i}. Address: {p}. Contact: {c}.",
    "hey can you do {n} {i} for {d}? going to {p}. cheers, {c}",
    "Customer {c} called from {p} asking for {n} {i}, to arrive {d}.",
    "For {d}, {n} {i} to {p} please. Regards, {c}",
    "{c} here. {n} {i}, {p}, no later than {d}.",
    "Dear team, kindly reserve {n} {i} for {c}; pick-up in {p} on {d}.",
    "The shop in {p} is out of {i}. Send {n} by {d}, attention {c}.",
    "{d} delivery to {p}: {c} takes {n} {i}.",
    "Put {c} down for {n} {i}. That goes to {p}, {d}.",
    "My name is {c}, I need {n} {i} in {p} by {d} at the latest.",
    "{n} {i} please, {d}, to {c} in {p}.",
    "Re: order. Quantity {n}, product {i}, city {p}, day {d}, buyer {c}.",
    "It is {c} again, same address in {p}, but {n} {i} this time, {d} works.",
    "To {p} by {d}: {n} {i}, signed for by {c}.",
    "{c} would be happy with {n} {i} on {d}. Ship them to {p}.",
    "As agreed with {c}, {n} {i} leave for {p} on {d}.",
    "Next {d} our {p} branch expects {n} {i}. Responsible: {c}.",
)
TEST_PATTERNS = (
    "Good morning! {c} speaking, calling about {n} {i}. {d} would be perfect, we are in {p}.",
    "Can I have {n} {i}? {p} is where I am, {d} is when I need them, {c} is the name.",
    "{i}: {n} pieces. Who: {c}. Where: {p}. When: {d}.",
    "Our buyer {c} asks whether {n} {i} could reach {p} on {d}.",
    "If possible, drop {n} {i} at {c}'s place in {p} {d} morning.",
    "Invoice {c} for {n} {i} and have them in {p} when {d} comes.",
    "Shipment for {p} leaving {d}: {c}, {n} {i}.",
    "I promised {c} that {n} {i} would be in {p} by {d}, please make it happen.",
    "{d}. {p}. {n} {i}. {c}.",
    "Quick one: {p} wants {n} {i} on {d}, booked under {c}.",
    "Would {d} be fine for bringing {n} {i} over to {p}? Yours, {c}",
    "There is a request by {c} for {n} {i}; {p} is the destination and {d} the date.",
)


def make_rows(num_rows: int, patterns: Sequence[str], rng: random.Random) -> list[dict[str, str]]:
    """Prompt and completion rows; the same generator state gives the same rows, and no prompt comes twice."""
    items = [tuple(pair.split("|")) for pair in ITEMS.split(";")]
    rows: dict[str, str] = {}
    while len(rows) < num_rows:
        quantity = rng.choice((rng.randint(1, 20), rng.randint(2, 99), rng.randint(100, 900)))
        words = quantity <= len(NUMBER_WORDS) and rng.random() < 0.4
        singular, plural = rng.choice(items)
        customer, place, day = f"{rng.choice(FIRST)} {rng.choice(LAST)}", rng.choice(CITIES), rng.choice(DAYS)
        text = rng.choice(patterns).format(
            n=NUMBER_WORDS[quantity - 1] if words else quantity,
            i=singular if quantity == 1 else plural,
            c=customer,
            p=place,
            d=day,
        )
        answer = {"customer": customer, "item": plural, "quantity": quantity, "city": place, "day": day}
        rows[text[0].upper() + text[1:] if rng.random() < 0.8 else text] = json.dumps(answer)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]


def write_rows(folder: Path) -> tuple[Path, Path]:
    """Writes train.jsonl and test.jsonl (always the same bytes) into a folder; returns their paths."""
    paths = []
    for name, num_rows, patterns, seed in (
        ("train", NUM_TRAIN, TRAIN_PATTERNS, SEED),
        ("test", NUM_TEST, TEST_PATTERNS, SEED + 1),
    ):
        rows = make_rows(num_rows, patterns, random.Random(seed))
        path = folder / f"{name}.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
        paths.append(path)
    return paths[0], paths[1]


def demo_recipe(rows_dir: Path, name: str = "demo", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of the demo over rows written to `rows_dir`."""
    train, test = write_rows(rows_dir)
    tree: dict[str, Any] = {
        "run": {"name": name},
        "model": {"base": "smollm2-135m"},
        "data": {"train": str(train), "test": str(test), "system": SYSTEM},
        "adapter": {"method": "lora", "r": 16, "alpha": 16, "target_modules": "all-linear"},
        "train": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "save_every_steps": 20},
        "evaluate": {"max_rows": NUM_TEST},
        "export": {"quantize": ["Q8_0", "Q4_K_M"]},
    }
    return build_recipe(tree, overrides, where="demo")
