"""Elastic-Cache: recompute from the layer above which attention to the most attended token changed."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vidlada.decoding.attention import FrameMap
from vidlada.decoding.kv_cache import attend_grouped
from vidlada.decoding.named import check_named
from vidlada.decoding.policies.base import ANSWER, EVERYTHING, AttentionPattern, Plan, StepContext
from vidlada.settings import setting


@dataclass(frozen=True)
class Elastic:
    """Elastic-Cache (arXiv 2510.14973): the block in every step, and everything from the layer above the first one in
    which the block's attention to its most attended token changed.

    Args:
        similarity: cosine between two steps' attention to that token below which it counts as changed.
    """

    name: ClassVar[str] = "elastic"
    similarity: float = setting(0.9, "Cosine of attention below which all above is recomputed.", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        check_named("cache", self)

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
        watched: layer → the token outside the block that the block attended to most, and how each query did: (block,).
    """

    def __init__(self, similarity: float):
        super().__init__()
        self.similarity = similarity
        self.watched: dict[int, tuple[int, Tensor]] = {}
        self.testing = False

    def begin_pass(self, plan: Plan, block: Tensor) -> None:
        """Only passes over the block alone are tested; others begin anew."""
        self.block, self.testing = block, plan.start.keys() == {"block"}
        if not self.testing:
            self.watched.clear()

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, layer: int, active: Tensor) -> Tensor:
        """See `AttentionPattern`."""
        place = torch.full((keys.shape[1],), -1, device=active.device).index_copy(
            0, active, torch.arange(len(active), device=active.device)
        )
        groups = len(queries) // len(keys)
        asking = queries[:, place[self.block]].unflatten(0, (-1, groups)).float()
        scores = asking @ keys[:, None].float().transpose(-1, -2) * queries.shape[-1] ** -0.5
        weights = scores.softmax(-1).mean((0, 1))  # (block, tokens)
        if self.testing and layer in self.watched:
            token, before = self.watched[layer]
            if float(F.cosine_similarity(weights[:, token], before, dim=0)) < self.similarity:
                self.joins[layer + 1] = (place < 0).nonzero()[:, 0]
                self.testing = False
        outside = weights.sum(0).index_fill(0, self.block, -torch.inf)
        best = int(outside.argmax())
        self.watched[layer] = best, weights[:, best].clone()
        return attend_grouped(queries, keys, values)
