"""A module imports only leftwards, and torch does not enter before `data.packing`."""

from __future__ import annotations

from source_tree import NAMES, ROOT, SOURCES, Source, imported_modules

# From left to right. A module stands at the longest name here that it belongs to.
DIRECTION = (
    "errors",
    "interval",
    "data.conversation",
    "recipe_faults",
    "settings",
    "recipe",
    "run",
    "lock",
    "show",
    "data",
    "model",
    "first_recipe",
    "adapters",
    "state",
    "engine",
    "checkpoint",
    "mirror",
    "plan",
    "changes",
    "pack_facts",
    "stored",
    "rendering",
    "prepare",
    "given_rows",
    "adopt",
    "preview",
    "metrics",
    "signals",
    "trial",
    "validation",
    "steps",
    "saver",
    "take_step",
    "ready",
    "train",
    "backends",
    "export",
    "evaluate",
    "verify",
    "preview_page",
    "review_page",
    "token_settings",
    "pipeline",
    "serve",
    "ship",
    "sweep",
    "cluster",
    "talk",
    "chat",
    "studio",
    "demo",
    "machine",
    "doctor",
    "doctor_bench",
    "chat_command",
    "terminal",
    "stage_commands",
    "data_commands",
    "show_command",
    "cli",
)
FREE_OF_TORCH = ("errors", "interval", "data", "settings", "recipe", "recipe_faults", "run", "lock", "show")


def station(name: str) -> str | None:
    """The longest entry of DIRECTION that a module belongs to; None for the package itself: leftmost."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in DIRECTION:
            return ".".join(parts[:end])
    return None


def place(name: str) -> int:
    where = station(name)
    return -1 if where is None else DIRECTION.index(where)


def own_imports(source: Source) -> list[tuple[str, str]]:
    """(module of Myna's that is imported, file:line), without itself."""
    found = [(name, source.at(node)) for name, node in imported_modules(source)]
    return [
        (name.removeprefix("myna").lstrip("."), where)
        for name, where in found
        if name.split(".")[0] == "myna" and name.removeprefix("myna").lstrip(".") != source.name
    ]


def test_every_module_has_its_place() -> None:
    homeless = sorted(name for name in NAMES if name and station(name) is None and name != "__main__")
    assert not homeless, f"say in DIRECTION where these stand: {homeless}"


def test_a_module_imports_only_leftwards() -> None:
    wrong = [
        f"{where}: {source.name or 'myna'} imports {name}"
        for source in SOURCES
        for name, where in own_imports(source)
        if source.name != "__main__" and place(name) > place(source.name)
    ]
    assert not wrong, "\n".join(["these look to the right:", *wrong])


def test_what_is_imported_is_there() -> None:
    wrong = [
        f"{where}: {name}"
        for source in SOURCES
        for name, where in own_imports(source)
        if name and name not in NAMES
    ]
    assert not wrong, "\n".join(wrong)


def test_no_package_goes_round_in_circles() -> None:
    below = {source.name: sorted({name for name, _ in own_imports(source) if name}) for source in SOURCES}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in below.get(name, ()):
                walk(other, (*trail, name))
            done.add(name)

    for name in below:
        walk(name, ())


def test_no_torch_left_of_packing() -> None:
    wrong = [
        f"{source.at(node)}: {name}"
        for source in SOURCES
        if (station(source.name) or "").split(".")[0] in FREE_OF_TORCH and source.name != "data.packing"
        for name, node in imported_modules(source)
        if name.split(".")[0] in ("torch", "transformers", "peft", "accelerate")
    ]
    assert not wrong, "\n".join(wrong)


def test_the_line_is_told_as_it_is() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = " ".join(line.removeprefix("> ") for line in page.splitlines() if line.startswith("> "))
    assert told.replace("/", ".").split(" → ") == list(DIRECTION)


def test_the_place_of_a_module() -> None:
    order = ["", "errors", "data.conversation", "recipe", "data", "data.render", "engine.lora", "cli"]
    places = [place(name) for name in order]
    assert places == sorted(places)
    assert place("data") == place("data.render") == place("data.conversation_of_another_name")
    assert station("no_such_module") is None
