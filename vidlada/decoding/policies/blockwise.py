"""Policies that recompute whole segments from the first layer: full, prefix, dual, frozen, interval."""

from dataclasses import dataclass
from typing import ClassVar

from vidlada.decoding.policies.base import ANSWER, EVERYTHING, MAX_STEPS, Plan, SegmentPolicy, StepContext
from vidlada.settings import setting


@dataclass(frozen=True)
class Full(SegmentPolicy):
    """Everything in every step, through the KV cache: the reference for the others. (`none` runs without a cache.)"""

    name: ClassVar[str] = "full"

    def plan(self, context: StepContext) -> Plan:
        """Everything."""
        return Plan(EVERYTHING)


@dataclass(frozen=True)
class Prefix(SegmentPolicy):
    """Fast-dLLM's prefix cache: all at a block's start, then the block and what follows it.

    Args:
        every: refresh everything again after so many steps within a block; 0 never.
    """

    name: ClassVar[str] = "prefix"
    between: ClassVar[dict[str, int]] = {"block": 0, "after": 0}
    every: int = setting(0, "Refresh everything again after so many steps.", minimum=0, maximum=MAX_STEPS)

    def plan(self, context: StepContext) -> Plan:
        """All at a block's start, and again where that is due."""
        due = context.step_in_block % (self.every or context.step_in_block + 1) == 0
        return Plan(EVERYTHING if due else self.between)


@dataclass(frozen=True)
class Dual(Prefix):
    """Fast-dLLM's dual cache: all at a block's start, then the block alone.

    Args:
        every: refresh everything again after so many steps within a block; 0 never.
    """

    name: ClassVar[str] = "dual"
    between: ClassVar[dict[str, int]] = {"block": 0}


@dataclass(frozen=True)
class Frozen(SegmentPolicy):
    """LaViDa's: the prompt once, the answer in every step."""

    name: ClassVar[str] = "frozen"

    def plan(self, context: StepContext) -> Plan:
        """All at first, then the answer."""
        return Plan(ANSWER if context.step else EVERYTHING)


@dataclass(frozen=True)
class Interval(SegmentPolicy):
    """After dLLM-Cache: prompt and answer on clocks of their own, and in between a part of the answer.

    In between, all answer positions run through the first layer and only the `share` whose values changed most go on;
    dLLM-Cache chooses anew in every layer.

    Args:
        prompt: steps between refreshes of text and frames.
        response: steps between refreshes of the whole answer.
        share: of the answer's positions recomputed in the other steps.
    """

    name: ClassVar[str] = "interval"
    prompt: int = setting(25, "Steps between refreshes of text and frames.", minimum=1, maximum=MAX_STEPS)
    response: int = setting(7, "Steps between refreshes of the answer.", minimum=1, maximum=MAX_STEPS)
    share: float = setting(0.25, "Of the answer recomputed in the other steps.", above=0, maximum=1)

    def plan(self, context: StepContext) -> Plan:
        """Whatever is due."""
        if context.step % self.prompt == 0:
            return Plan(EVERYTHING)
        if context.step % self.response == 0 or self.share == 1:
            return Plan(ANSWER)
        return Plan(ANSWER, narrow=self.share)
