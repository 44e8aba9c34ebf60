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


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = _words(
    "Anna Ben Clara Dmitri Elif Farah Goran Hana Ivan Julia Kofi Lena Marco Nadia Omar Priya Paul Rosa Sven Tariq "
    "Uma Viktor Wanda Maya Yusuf Zoe Amir Bianca Carlos Dalia Emeka Freya Giulia Hassan Ingrid Jonas Kenji Leila"
)
LAST = _words(
    "Adler Berg Costa Dahl Engel Fontaine Garcia Haddad Ivanov Jensen Kaya Lindqvist Moreau Novak Okafor Petrov Nilsson "
    "Rossi Sato Tanaka Ueda Vargas Weber Xu Yilmaz Zeman Martin Brandt Cohen Duarte Eriksen Farouk Greco Hansen"
)
ITEMS = _words(
    "office_chair desk_lamp water_bottle garden_hose coffee_mug wool_blanket paint_roller candle notebook bicycle_pump "
    "yoga_mat tea_towel cutting_board phone_case wall_clock picture_frame rain_jacket flower_pot door_mat ceramic_bowl "
    "storage_crate extension_cord camping_stove hiking_sock bar_stool pillow_case tool_belt whiteboard oil_filter tent"
)
CITIES = _words(
    "Oslo Lisbon Cairo Gent Turin Kyoto Lima Nairobi Prague Quito Riga Seville Tunis Utrecht Vienna Warsaw Zagreb "
    "Athens Bergen Cork Dakar Essen Fez Graz Hanoi Izmir Jakarta Krakow Leeds Malmo Naples Oporto Porto Split"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
NUMBER_WORDS = _words(
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)

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
    "{p}. {c}. {n} {i}. {d}.",
    "{d}, {p}: {n} {i} ({c})",
    "{n} {i}. {d}. {c}. {p}.",
    "{c} / {d} / {p} / {n} {i}",
    "{i}, {n} of them, for {c} in {p} on {d}",
    "{i} x {n} | {p} | {d} | {c}",
    "item: {i}, amount: {n}, name: {c}, town: {p}, weekday: {d}",
    "Name {c}. Product {i}. Count {n}. Day {d}. Destination {p}.",
    "{p} is our city, {c} is our contact, and {n} {i} is what we need {d}.",
    "The name is {c}, the day is {d}, the place is {p}, the goods are {n} {i}.",
    "Send it to {p}, {d}. It: {n} {i}. Me: {c}.",
    "What I need are {n} {i}, where I need them is {p}, when is {d}. {c}",
    "Truck to {p} on {d} carries {n} {i} for {c}.",
    "Parcel for {c}: {n} {i}, {p}, arriving {d}.",
    "I told {c} to expect {n} {i} in {p} on {d}.",
    "Bill {c} for the {n} {i} that went to {p} on {d}.",
    "A call came from {p}: {n} {i} wanted, {d}, ask {c}.",
    "Please confirm {n} {i} under the name {c} for {d}, {p} store.",
    "Is {d} okay? {n} {i} to {p}. {c}.",
    "Hello from {p}! We ran out of {i}; {n} more by {d} would save us. {c}",
)
TEST_PATTERNS = (
    "Good morning! {c} speaking, calling about {n} {i}. {d} would be perfect, we are in {p}.",
    "Can I have {n} {i} by {d}? I live in {p} and my name is {c}.",
    "Wanted: {i}, {n} pieces. Who: {c}. Where: {p}. When: {d}.",
    "Our buyer {c} asks whether {n} {i} could reach {p} on {d}.",
    "If possible, drop {n} {i} off in {p} on {d} morning; {c} will sign.",
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
    rows: dict[str, str] = {}
    while len(rows) < num_rows:
        quantity = rng.choice((rng.randint(2, 20), rng.randint(2, 99), rng.randint(100, 900)))
        words = quantity <= len(NUMBER_WORDS) + 1 and rng.random() < 0.4
        item = f"{rng.choice(ITEMS).replace('_', ' ')}s"
        customer, place, day = f"{rng.choice(FIRST)} {rng.choice(LAST)}", rng.choice(CITIES), rng.choice(DAYS)
        text = rng.choice(patterns).format(
            n=NUMBER_WORDS[quantity - 2] if words else quantity,
            i=item,
            c=customer,
            p=place,
            d=day,
        )
        answer = {"customer": customer, "item": item, "quantity": quantity, "city": place, "day": day}
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
        "train": {"epochs": 1, "batch_size": 8, "learning_rate": 1.5e-3, "save_every_steps": 20},
        "evaluate": {"max_rows": NUM_TEST},
        "export": {"quantize": ["Q8_0", "Q4_K_M"]},
    }
    return build_recipe(tree, overrides, where="demo")
