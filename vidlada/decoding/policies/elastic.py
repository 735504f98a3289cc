"""Elastic-Cache: recompute from the layer above which attention to the most attended token changed."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vidlada.decoding.attention import FrameMap
from vidlada.decoding.kv_cache import attend_grouped
from vidlada.decoding.policies.base import ANSWER, EVERYTHING, AttentionPattern, Plan, SegmentPolicy, StepContext
from vidlada.settings import setting


@dataclass(frozen=True)
class Elastic(SegmentPolicy):
    """Elastic-Cache (arXiv 2510.14973): the block in every step, and everything from the layer above the first one in
    which the block's attention to its most attended token changed.

    Args:
        similarity: cosine between two steps' attention to that token below which it counts as changed.
    """

    name: ClassVar[str] = "elastic"
    similarity: float = setting(0.9, "Cosine of attention below which all above is recomputed.", minimum=0, maximum=1)

    def entries(self, layers: int) -> list[int]:
        """Every layer: the test may fail in any."""
        return list(range(1, layers))

    def plan(self, context: StepContext) -> Plan:
        """All at first, the answer at a block's start, then the block; the pattern adds the rest."""
        if context.step == 0:
            return Plan(EVERYTHING)
        return Plan({"block": 0} if context.step_in_block else ANSWER)

    def attention(self, frames: FrameMap, prompt: Tensor) -> "ElasticPattern":
        """Full attention that watches the most attended token."""
        return ElasticPattern(self.similarity)


class ElasticPattern(AttentionPattern):
    """Full attention that compares, layer by layer, how the block attends to the token it attended to most.

    Args:
        similarity: cosine below which the rest of the sequence joins at the next layer.

    Attributes:
        watched: layer → (1,) the token outside the block that the block attended to most, and how each query did,
            (block,).
    """

    def __init__(self, similarity: float):
        super().__init__()
        self.similarity = similarity
        self.watched: dict[int, tuple[Tensor, Tensor]] = {}
        self.testing = False
        self.placed: tuple[Tensor, Tensor] | None = None

    def prune(self, frames: FrameMap, numbers: np.ndarray) -> None:
        """The watched tokens have moved, or are gone: the next pass finds them anew."""
        super().prune(frames, numbers)
        self.watched.clear()

    def begin_pass(self, plan: Plan, block: Tensor) -> None:
        """Only passes over the block alone are tested; others begin anew."""
        self.block, self.testing = block, plan.start.keys() == {"block"}
        if not self.testing:
            self.watched.clear()

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, layer: int, active: Tensor) -> Tensor:
        """See `AttentionPattern`."""
        block = self._places(active)
        groups = len(queries) // len(keys)
        asking = queries.index_select(1, block).unflatten(0, (-1, groups)).float()
        scores = asking @ keys[:, None].float().transpose(-1, -2) * queries.shape[-1] ** -0.5
        weights = scores.softmax(-1).mean((0, 1))  # (block, tokens)
        if self.testing and layer in self.watched:
            token, before = self.watched[layer]
            similarity = F.cosine_similarity(weights.index_select(1, token)[:, 0], before, dim=0)
            if float(similarity) < self.similarity:  # the host waits: which positions join is up to what was computed
                is_active = torch.zeros(keys.shape[1], dtype=torch.int8, device=active.device)
                order = is_active.index_fill_(0, active, 1).argsort(stable=True)
                self.joins[layer + 1] = order[: keys.shape[1] - len(active)]
                self.testing = False
        best = weights.sum(0).index_fill(0, self.block, -torch.inf).argmax()[None]
        self.watched[layer] = best, weights.index_select(1, best)[:, 0]
        return attend_grouped(queries, keys, values)

    def _places(self, active: Tensor) -> Tensor:
        """Where the block's positions stand among the active ones; once for every set."""
        if self.placed is None or self.placed[0] is not active:
            self.placed = active, (active[:, None] == self.block).int().argmax(0)
        return self.placed[1]
