"""What packing saves: counted from the packs as the plan has them and as the engine lays them out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from myna.data.epochs import Part
from myna.data.packing import Step, collate, plan_packs
from myna.data.render import Example
from myna.data.token_rows import lengths_of
from myna.plan import FrozenPlan
from myna.recipe import Recipe
from myna.settings import TrainSettings

MOST_STEPS = 200  # that are laid out; their packs are like the others'


@dataclass(frozen=True)
class PackFacts:
    """Of the first `num_steps` of `all_steps` an epoch.

    `tokens` are the rows' own, `computed` those of the packs, where a beginning that rows share stands once, and `padded`
    those of a batch a step, every row as long as the longest.
    """

    num_steps: int
    all_steps: int
    num_packs: int
    pack_tokens: int
    tokens: int
    computed: int
    padded: int

    @property
    def packs_a_step(self) -> float:
        return self.num_packs / self.num_steps

    @property
    def fill(self) -> float:
        """The rows' tokens ÷ the packs' room; above 1 where single rows are longer than a pack."""
        return self.tokens / (self.num_packs * self.pack_tokens)

    @property
    def shared(self) -> int:
        """Tokens that are not computed again."""
        return self.tokens - self.computed

    def as_json(self) -> dict[str, Any]:
        derived = {"packs_a_step": self.packs_a_step, "fill": self.fill}
        return asdict(self) | {name: round(value, 4) for name, value in derived.items()}

    def sentences(self) -> Iterator[str]:
        of = (
            f", of the first {self.num_steps:,} of {self.all_steps:,} steps"
            if self.num_steps < self.all_steps
            else ""
        )
        yield (
            f"packs: {self.packs_a_step:.1f} a step, {self.fill:.0%} of {self.pack_tokens:,} tokens full{of}"
        )
        if self.shared:
            yield (
                f"shared beginnings: {self.shared:,} of {self.tokens:,} tokens ({self.shared / self.tokens:.0%}) "
                "are computed for several rows at once"
            )
        if self.padded > self.computed:
            yield (
                f"padded batches of the same rows would have {self.padded:,} tokens, "
                f"{self.padded / self.computed:.1f} times as many as the packs' {self.computed:,}"
            )


def pack_facts(
    examples: Sequence[Example], steps: Sequence[Step], pack_tokens: int, *, share: bool
) -> PackFacts:
    """Lays out the packs of the first steps; with `share` rows share beginnings, as on the fast path without dropout."""
    counted = steps[:MOST_STEPS]
    num_packs = tokens = computed = padded = 0
    for step in counted:
        batches = [collate([examples[row] for row in pack], share=share) for pack in step]
        lengths = [length for batch in batches for length in batch.lengths]
        num_packs += len(batches)
        tokens += sum(lengths)
        computed += sum(len(batch.input_ids_T) for batch in batches)
        padded += len(lengths) * max(lengths)
    return PackFacts(len(counted), len(steps), num_packs, pack_tokens, tokens, computed, padded)


def first_packs(
    examples: Sequence[Example], parts: Sequence[Part], recipe: Recipe, plan: FrozenPlan
) -> PackFacts:
    """What the packs of the first epoch come to."""
    steps = epoch_packs(lengths_of(examples), parts, recipe.train, plan, epoch=0)
    share = plan.path == "fast" and not recipe.adapter.dropout
    return pack_facts(examples, steps, plan.pack_tokens, share=share)


def epoch_packs(
    lengths: Sequence[int], parts: Sequence[Part], settings: TrainSettings, plan: FrozenPlan, *, epoch: int
) -> list[Step]:
    """The packs of an epoch, by step, as recipe and plan have them."""
    return plan_packs(
        lengths,
        seed=settings.seed,
        epoch=epoch,
        batch_size=settings.batch_size,
        pack_tokens=plan.pack_tokens,
        parts=parts,
        order=settings.order,
    )
