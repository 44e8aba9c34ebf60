"""What a race came to: spreads, ratios and the bars they are held against. Pure functions of laps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from _laps import Lap

Laps = Mapping[str, Sequence[Lap]]  # by variant, in the order of the rounds


@dataclass(frozen=True)
class Spread:
    """The lowest, the median and the highest of several repeats."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Bar:
    """What a figure must reach, and its goal; `at_most` where less is better. Above `limit` it was measured wrongly."""

    must: float
    goal: float
    at_most: bool = False
    limit: float = math.inf

    def verdict(self, value: float) -> str:
        """goal, must, missed or void."""
        if value > self.limit:
            return "void"
        sign = -1 if self.at_most else 1
        if sign * value >= sign * self.goal:
            return "goal"
        return "must" if sign * value >= sign * self.must else "missed"


@dataclass(frozen=True)
class Figure:
    """One line of the result: a ratio of medians, the spread of it over the rounds, and its bar where it has one."""

    what: str
    value: float
    spread: Spread | None = None
    bar: Bar | None = None

    @property
    def verdict(self) -> str:
        return self.bar.verdict(self.value) if self.bar else ""


# by workload (the name of the rows), then by storage of the frozen base
SPEED_BARS: dict[str, dict[str, Bar]] = {
    "chat": {"none": Bar(3.0, 5.0), "int8": Bar(3.75, 6.0)},
    "snips_json": {"none": Bar(3.5, 6.0), "int8": Bar(4.5, 9.0)},
}
# more than the peak is not to be had: then the peak was measured while the machine was busy
SHARE_BARS = {"chat": Bar(0.5, 0.75, limit=1.0)}
SLOWDOWN_BAR = Bar(2.5, 2.0, at_most=True)
MEMORY_BAR = Bar(0.6, 0.4, at_most=True)


@dataclass(frozen=True)
class MynaVariant:
    """`kernels` is None as shipped (compiled where there is a compiler), "torch" for plain torch."""

    quantize: str = "none"
    kernels: str | None = None

    @property
    def name(self) -> str:
        storage = "bf16" if self.quantize == "none" else self.quantize
        return f"Myna {storage}" + (", plain torch" if self.kernels == "torch" else "")


@dataclass(frozen=True)
class PeerVariant:
    micro: int
    accumulate: int
    precision: str = "bf16"

    @property
    def name(self) -> str:
        return f"TRL {self.precision} {self.micro}×{self.accumulate}"


@dataclass(frozen=True)
class Race:
    """All that was measured. Peaks of fresh processes in MB, `product_peak` in FLOP/s."""

    workload: str
    myna: tuple[MynaVariant, ...]
    peers: tuple[PeerVariant, ...]
    quiet: Laps
    fresh_mb: Mapping[str, float]
    product_peak: float
    beside: Laps = field(default_factory=dict)
    curves: Laps = field(default_factory=dict)


def spread(values: Sequence[float]) -> Spread:
    return Spread(min(values), statistics.median(values), max(values))


def speed(laps: Sequence[Lap]) -> Spread:
    """tokens/s."""
    return spread([lap.tokens_per_s for lap in laps])


def best_peer(race: Race) -> str | None:
    """The peer's bf16 variant with the fastest median, None in a race without a peer: what the bars are held against."""
    names = [variant.name for variant in race.peers if variant.precision == "bf16"]
    return max(names, key=lambda name: speed(race.quiet[name]).middle, default=None)


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, Spread]:
    """The ratio of the medians, and the spread of the ratios round by round (both ran close together in time)."""
    rounds = [a / b for a, b in zip(above, below, strict=True)]
    return statistics.median(above) / statistics.median(below), spread(rounds)


def figures(race: Race) -> list[Figure]:
    """Every line that the race can fill: speeds against the peer's best, slowdown, memory, share of the peak."""
    return [*_speeds(race), *_slowdowns(race), *_memory(race), *_shares(race)]


def _speeds(race: Race) -> list[Figure]:
    """Against the peer's best in bf16, and without a bar against what its users may run on a CPU that is slow in bf16."""
    best = best_peer(race)
    if best is None:
        return []
    others = [variant.name for variant in race.peers if variant.precision != "bf16"]
    found = []
    for name in (best, *others):
        theirs = [lap.tokens_per_s for lap in race.quiet[name]]
        for variant in race.myna:
            value, rounds = ratio([lap.tokens_per_s for lap in race.quiet[variant.name]], theirs)
            bar = SPEED_BARS.get(race.workload, {}).get(variant.quantize) if name == best else None
            found.append(Figure(f"{variant.name}: tokens/s ÷ {name}", value, rounds, bar))
    return found


def _slowdowns(race: Race) -> list[Figure]:
    """The bar is on Myna; the peer's own slowdown stands beside it."""
    found = []
    for name, laps in race.beside.items():
        quiet = [lap.tokens_per_s for lap in race.quiet[name]]
        value, rounds = ratio(quiet, [lap.tokens_per_s for lap in laps])
        bar = SLOWDOWN_BAR if name.startswith("Myna") else None
        found.append(Figure(f"{name}: times slower beside one endless loop", value, rounds, bar))
    best = best_peer(race)
    if best is not None and best in race.beside:
        theirs = [lap.tokens_per_s for lap in race.beside[best]]
        for name in (name for name in race.beside if name != best):
            value, rounds = ratio([lap.tokens_per_s for lap in race.beside[name]], theirs)
            found.append(Figure(f"{name}: tokens/s ÷ {best}, both beside one endless loop", value, rounds))
    return found


def own_memory(race: Race, name: str) -> list[float]:
    """Peak memory of each lap in MB, less that of a fresh `import torch` in the same interpreter."""
    fresh = race.fresh_mb["myna" if name.startswith("Myna") else "peer"]
    return [lap.peak_mb - fresh for lap in race.quiet[name]]


def _memory(race: Race) -> list[Figure]:
    best = best_peer(race)
    if best is None:
        return []
    found = []
    for variant in race.myna:
        value, rounds = ratio(own_memory(race, variant.name), own_memory(race, best))
        bar = MEMORY_BAR if variant.quantize == "none" else None
        found.append(Figure(f"{variant.name}: peak memory ÷ {best}, less `import torch`", value, rounds, bar))
    return found


def _shares(race: Race) -> list[Figure]:
    found = []
    for variant in race.myna:
        rates = [lap.flops_per_s for lap in race.quiet[variant.name]]
        known = [rate / race.product_peak for rate in rates if rate is not None]
        if len(known) < len(rates) or not known:
            continue
        bar = SHARE_BARS.get(race.workload) if variant.quantize == "none" else None
        shares = spread(known)
        found.append(Figure(f"{variant.name}: products ÷ the float peak", shares.middle, shares, bar))
    return found
