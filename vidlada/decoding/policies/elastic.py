"""Elastic-Cache: recompute from the layer above which attention to the most attended token changed."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vidlada.decoding.attention import FrameMap
from vidlada.decoding.kv_cache import KVCache, PartialPass, attend_grouped, cosine, refresh
from vidlada.decoding.policies.base import ANSWER, EVERYTHING, AttentionPattern, Plan, SegmentPolicy, StepContext
from vidlada.model.language_model import LanguageModel
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

    Layers are compared after the pass, all at once: the host waits once, and where attention changed, everything above
    is computed again.

    Args:
        similarity: cosine below which all above is recomputed.

    Attributes:
        weights: layer → (block, tokens) the block's attention in the pass that runs, mean of the heads.
        watched: of each layer the token outside the block that the block attended to most, (layers,), and how each
            query did, (layers, block); None where the next pass has nothing to be compared with.
    """

    def __init__(self, similarity: float):
        super().__init__()
        self.similarity = similarity
        self.weights: dict[int, Tensor] = {}
        self.watched: tuple[Tensor, Tensor] | None = None
        self.leading = False  # the block's are the first of the pass's positions
        self.placed: tuple[Tensor, Tensor] | None = None

    def prune(self, frames: FrameMap, numbers: np.ndarray) -> None:
        """The watched tokens have moved, or are gone: the next pass finds them anew."""
        super().prune(frames, numbers)
        self.watched = None

    def begin_pass(self, plan: Plan, block: Tensor) -> None:
        """Only passes over the block alone are compared; others begin anew."""
        self.block, self.leading = block, plan.start.keys() == {"block"}
        if not self.leading:
            self.watched = None

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, layer: int, active: Tensor) -> Tensor:
        """See `AttentionPattern`."""
        asking = queries[:, : len(self.block)] if self.leading else queries.index_select(1, self._places(active))
        asking = asking.reshape(len(keys), -1, queries.shape[-1])  # (key/value heads, queries of a group, head_dim)
        nothing, scale = keys.new_empty(1, 1, 1), queries.shape[-1] ** -0.5
        scores = torch.baddbmm(nothing, asking, keys.transpose(-1, -2), beta=0, alpha=scale)
        weights = scores.softmax(-1).unflatten(1, (-1, len(self.block)))
        self.weights[layer] = weights.mean((0, 1), dtype=torch.float32)
        return attend_grouped(queries, keys, values)

    @torch.inference_mode()
    def finish_pass(self, language_model: LanguageModel, kv_cache: KVCache, answer: Tensor) -> None:
        """Compute everything again above the first layer where attention changed; note what to watch next."""
        weights = torch.stack(list(self.weights.values()))  # (layers, block, tokens)
        changed = self._first_changed(weights)
        if changed is not None and changed + 1 < len(weights):
            in_block = torch.zeros(kv_cache.keys[0].shape[1], dtype=torch.int8, device=self.block.device)
            block_first = in_block.index_fill_(0, self.block, 1).argsort(descending=True, stable=True)
            joins = {changed + 1: block_first}
            refresh(language_model, [PartialPass(kv_cache, joins, self, wanted=len(self.block))])
            weights = torch.stack(list(self.weights.values()))
        most = weights.sum(1).index_fill(1, self.block, -torch.inf).argmax(1)
        self.watched = most, attention_to(weights, most)
        self.weights.clear()

    def _first_changed(self, weights: Tensor) -> int | None:
        """The lowest layer in which attention to the watched token changed."""
        if self.watched is None:
            return None
        most, before = self.watched
        similarity = cosine(attention_to(weights, most), before, -1)
        below = (similarity < self.similarity).tolist()  # the host waits: what is computed again is up to the values
        return below.index(True) if True in below else None

    def _places(self, active: Tensor) -> Tensor:
        """Where the block's positions stand among the active ones; once for every set."""
        if self.placed is None or self.placed[0] is not active:
            self.placed = active, (active[:, None] == self.block).int().argmax(0)
        return self.placed[1]


def attention_to(weights: Tensor, tokens: Tensor) -> Tensor:
    """Each query's attention to one token a layer, (layers, block).

    Args:
        weights: (layers, block, tokens).
        tokens: (layers,).
    """
    return weights.gather(2, tokens[:, None, None].expand(-1, weights.shape[1], 1))[..., 0]
