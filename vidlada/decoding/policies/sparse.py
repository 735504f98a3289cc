"""Sparse-dLLM: the block looks only at the keys it attended to most."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidlada.decoding.attention import FrameMap
from vidlada.decoding.kv_cache import attend_grouped, key_value_bytes
from vidlada.decoding.policies.base import EVERYTHING, AttentionPattern, Plan, SegmentPolicy, StepContext
from vidlada.generation import GenerationSettings
from vidlada.model.config import VidLaDATextConfig
from vidlada.settings import setting


@dataclass(frozen=True)
class Sparse(SegmentPolicy):
    """After Sparse-dLLM: two full steps of a block, then the block alone, looking at the keys it attended to most.

    Args:
        keep: share of the keys outside the block that stay in sight.
    """

    name: ClassVar[str] = "sparse"
    keep: float = setting(0.5, "Share of the keys outside the block that stay in sight.", above=0, maximum=1)

    def plan(self, context: StepContext) -> Plan:
        """All twice, selecting in the second, then the block."""
        if context.step_in_block < 2:
            return Plan(EVERYTHING, select=context.step_in_block == 1)
        return Plan({"block": 0})

    def attention(self, frames: FrameMap, prompt: Tensor) -> "SparsePattern":
        """Attention to the kept keys."""
        return SparsePattern(self.keep)

    def pattern_bytes(
        self, config: VidLaDATextConfig, tokens: int, settings: GenerationSettings, value_bytes: int
    ) -> int:
        """The gathered keys and values."""
        block = min(settings.block_length, tokens)
        return key_value_bytes(config, block + max(1, round(self.keep * (tokens - block))), value_bytes)


class SparsePattern(AttentionPattern):
    """The block attends to itself and, of everything else, to the keys it attended to most (Sparse-dLLM).

    They are gathered once, when they are selected, into `compact`.

    Args:
        keep: share of the keys outside the block that are kept.
    """

    def __init__(self, keep: float):
        super().__init__()
        self.keep, self.select = keep, False
        self.block: Tensor

    def begin_pass(self, plan: Plan, block: Tensor) -> None:
        """A pass over everything starts a new selection."""
        self.block, self.select = block, plan.select
        if "text" in plan.start:
            self.compact.clear()

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, layer: int, active: Tensor) -> Tensor:
        """See `AttentionPattern`."""
        if self.select:
            in_block = (active[:, None] == self.block).int().argmax(0)  # places of the block among the active ones
            kept = self._most_attended(queries.index_select(1, in_block), keys)
            self.compact[layer] = torch.cat((keys.index_select(1, kept), values.index_select(1, kept)))
        return attend_grouped(queries, keys, values)

    def _most_attended(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The block's positions, and behind them those it attends to most."""
        groups = len(queries) // len(keys)
        scores = queries.unflatten(0, (-1, groups)).float() @ keys[:, None].float().transpose(-1, -2)
        received = scores.mean((0, 1, 2))  # (tokens,)
        received = torch.nn.functional.max_pool1d(received[None], 3, stride=1, padding=1)[0]
        received = received.index_fill(0, self.block, -torch.inf)
        outside = len(received) - len(self.block)
        best = received.topk(max(1, round(self.keep * outside))).indices if outside else self.block[:0]
        return torch.cat((self.block, best.sort().values))
