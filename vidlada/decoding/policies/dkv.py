"""dKV-Cache: a token is cached one step after it was decoded."""

from dataclasses import dataclass
from typing import ClassVar

from vidlada.decoding.policies.base import EVERYTHING, MAX_STEPS, Plan, SegmentPolicy, StepContext
from vidlada.settings import setting


@dataclass(frozen=True)
class DelayedKV(SegmentPolicy):
    """dKV-Cache (arXiv 2505.15781): all every so many steps; in between, slots that were open in the step before.

    A token's keys and values change most in the step after it was decoded, so they are kept only from then on.

    Args:
        every: steps between full refreshes.
    """

    name: ClassVar[str] = "dkv"
    every: int = setting(8, "Steps between full refreshes.", minimum=1, maximum=MAX_STEPS)

    def plan(self, context: StepContext) -> Plan:
        """All, or what is not decided or only just."""
        return Plan({"undecided": 0} if context.step % self.every else EVERYTHING)
