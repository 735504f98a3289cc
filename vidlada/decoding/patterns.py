"""How the queries of a pass see the store, where that is not everything."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vidlada.decoding.attention import FrameMap, chunked_attention, find_anchors
from vidlada.decoding.fused import FusedChunks
from vidlada.decoding.store import attend_grouped


@dataclass
class FramePattern:
    """Visual queries see their neighbourhood, anchors and text; all other queries see everything.

    Attributes:
        frames: where the frames stand.
        window: neighbours on either side.
        anchors: how many to keep; 0 for none.
        queries: sampled in the search.
        per_head: anchors of each key/value head instead of each layer.
        scenes: numbers of the visual tokens of every scene; each gets an equal share of anchors and queries.
        fused: run chunk attention as one kernel instead of on gathered blocks.
        renewed_from: first layer where this pass recomputes the visual tokens; None where it leaves them alone. Single
            ones that are probed see everything.
        chunked: restrict visual queries in this pass.
        search: look for anchors in this pass.
        found: layer → positions of its anchors, kept over steps.
    """

    frames: FrameMap
    window: int
    anchors: int
    queries: int
    per_head: bool
    scenes: tuple[Tensor, ...]
    fused: bool = False
    renewed_from: int | None = None
    chunked: bool = False
    search: bool = False
    found: dict[int, Tensor] = field(default_factory=dict)
    kernel: FusedChunks | None = field(default=None, init=False)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, layer: int, active: Tensor) -> Tensor:
        """See `vidlada.decoding.store.Pattern`."""
        # asked of the plan and not of the tensors, for which a GPU would have to be waited for in every layer
        if self.renewed_from is None or layer < self.renewed_from or not (self.chunked or self.search):
            return attend_grouped(queries, keys, values)
        is_visual, visual = self.frames.frame_of[active] >= 0, self.frames.visual
        visual_queries = queries[:, is_visual]
        if self.search:
            best = [self._anchors(visual_queries[:, scene], keys[:, visual[scene]]) for scene in self.scenes]
            self.found[layer] = torch.cat(
                [visual[scene][chosen] for scene, chosen in zip(self.scenes, best, strict=True)], dim=-1
            )
        if not self.chunked:
            return attend_grouped(queries, keys, values)
        mixed = torch.empty_like(queries)
        mixed[:, is_visual] = self._chunks(visual_queries, keys, values, self.found.get(layer))
        if len(visual) < len(active):
            mixed[:, ~is_visual] = attend_grouped(queries[:, ~is_visual], keys, values)
        return mixed

    def _chunks(self, queries: Tensor, keys: Tensor, values: Tensor, anchors: Tensor | None) -> Tensor:
        """Chunk attention of all visual queries."""
        if not self.fused:
            return chunked_attention(queries, keys, values, self.frames, self.window, anchors)
        if self.kernel is None:
            self.kernel = FusedChunks(
                self.frames, self.window, len(queries), 0 if anchors is None else anchors.shape[-1]
            )
        return self.kernel(queries, keys, values, anchors)

    def _anchors(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Anchors of one scene, as numbers of its tokens."""
        tokens, share = keys.shape[1], len(self.scenes)
        sampled = torch.linspace(0, tokens - 1, min(max(1, self.queries // share), tokens), device=keys.device).long()
        return find_anchors(queries[:, sampled], keys, min(max(1, self.anchors // share), tokens), self.per_head)


@dataclass
class SparsePattern:
    """The block sees itself and, of everything else, the keys it attended to most (Sparse-dLLM).

    Attributes:
        keep: share of the keys outside the block that stay in sight.
        block: positions of the current block.
        select: choose in this pass.
        kept: layer → positions that stay in sight, the block's among them.
    """

    keep: float
    block: Tensor
    select: bool = False
    kept: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, layer: int, active: Tensor) -> Tensor:
        """See `vidlada.decoding.store.Pattern`."""
        if self.select:
            in_block = torch.isin(active, self.block)
            self.kept[layer] = self._most_attended(queries[:, in_block], keys)
        elif layer in self.kept:
            keys, values = keys[:, self.kept[layer]], values[:, self.kept[layer]]
        return attend_grouped(queries, keys, values)

    def _most_attended(self, queries: Tensor, keys: Tensor) -> Tensor:
        groups = len(queries) // len(keys)
        scores = queries.unflatten(0, (-1, groups)).float() @ keys[:, None].float().transpose(-1, -2)
        received = scores.mean((0, 1, 2))  # (tokens,)
        received = torch.nn.functional.max_pool1d(received[None], 3, stride=1, padding=1)[0]
        received[self.block] = -torch.inf
        outside = len(received) - len(self.block)
        best = received.topk(max(1, round(self.keep * outside))).indices if outside else received.new_empty(0).long()
        return torch.cat((best, self.block)).sort().values
