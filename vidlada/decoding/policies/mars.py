"""MARS-Cache (VidLaDA, arXiv 2601.17868): the schedule, and frame-wise chunk attention with anchors."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit

from vidlada.decoding.attention import FrameMap, chunked_attention, find_anchors, scenes_of
from vidlada.decoding.fused import FusedChunks, can_fuse
from vidlada.decoding.kv_cache import attend_grouped
from vidlada.decoding.policies.base import (
    ANSWER,
    EVERYTHING,
    MAX_STEPS,
    AttentionPattern,
    Plan,
    SegmentPolicy,
    StepContext,
)
from vidlada.errors import InputError
from vidlada.settings import setting

DEFAULT_ANCHORS = 64

log = logging.getLogger("vidlada.decoding")


@dataclass(frozen=True)
class Mars(SegmentPolicy):
    """MARS-Cache (VidLaDA, arXiv 2601.17868): text and frames refreshed at their own intervals, deep layers more often.

    Layers form groups. The deepest is refreshed every `text` steps (frames: every `ratio` times as many); going down,
    each group's interval is `pyramid` times that of the group above it, or `text_pyramid` times for text. A refresh
    that is due for a group starts at its entry and runs to the top, so it includes all deeper groups.

    Args:
        text: steps between refreshes of text in the deepest group (τ_t).
        ratio: frames are refreshed `ratio` times less often (R = τ_v / τ_t).
        group: layers in a group.
        pyramid: ratio of a group's interval to the next deeper one's; 1 refreshes all layers together.
        text_pyramid: the same ratio for text, which is cheaper to refresh than frames.
        window: chunk attention: neighbouring frames on either side that a visual query attends to in a refresh; -1 for
            full attention.
        anchors: with a window, visual tokens that all visual queries attend to as well; 0 for none. By default 64, or
            all where there are fewer.
        queries: visual queries sampled in the search for anchors.
        per_head: anchors of each key/value head instead of each layer.
        chunk_first: restrict visual queries in the first step too.
        drift: above 0, refresh by measurement instead of at intervals: a few probed positions are recomputed in every
            step, and a segment is refreshed from the lowest group where their values moved further than this (1 -
            cosine) since its last refresh.
        probes: positions probed in each segment.
        scene: above 0, a scene begins where a frame's mean embedding differs by more than this (1 - cosine) from that
            of the frame before, and every scene has anchors of its own, found by queries of its own.
        fused: chunk attention as one kernel (FlexAttention) instead of on gathered blocks, with the same result; by
            default on a GPU.
    """

    name: ClassVar[str] = "mars"
    presets: ClassVar[dict[str, dict[str, int]]] = {
        # What the paper gives; the text interval and the number of anchors, which it does not give, are our own.
        "paper": {"text": 4, "ratio": 2, "group": 4, "pyramid": 2, "text_pyramid": 2, "window": 1, "queries": 32}
    }
    text: int = setting(4, "Steps between refreshes of text in the deepest group.", minimum=1, maximum=MAX_STEPS)
    ratio: int = setting(8, "Frames are refreshed so many times less often.", minimum=1, maximum=MAX_STEPS)
    group: int = setting(4, "Layers in a group.", minimum=1, maximum=1024)
    pyramid: int = setting(2, "A group's interval over the next deeper one's.", minimum=1, maximum=MAX_STEPS)
    text_pyramid: int = setting(1, "The same for text.", minimum=1, maximum=MAX_STEPS)
    window: int = setting(-1, "Frames on either side that a visual query sees; -1: all.", minimum=-1, maximum=2**16)
    anchors: int | None = setting(None, "Visual tokens that all visual queries see.", minimum=0, maximum=2**20)
    queries: int = setting(32, "Visual queries sampled in the search for anchors.", minimum=1, maximum=2**20)
    per_head: bool = setting(False, "Anchors of each key/value head.")
    chunk_first: bool = setting(False, "Restrict visual queries in the first step too.")
    drift: float = setting(0.0, "Refresh what moved further than this (1 - cosine).", minimum=0, maximum=2)
    probes: int = setting(8, "Positions probed in each segment, with drift.", minimum=1, maximum=2**20)
    scene: float = setting(0.0, "A frame that differs by more (1 - cosine) begins a scene.", minimum=0, maximum=2)
    fused: bool | None = setting(None, "Chunk attention as one kernel.")

    def __post_init__(self) -> None:
        super().__post_init__()
        needs_window = {name: getattr(self, name) for name in ("anchors", "per_head", "chunk_first", "scene", "fused")}
        for name, value in needs_window.items():
            if value and not self.chunks:
                raise InputError(f"cache mars: {name}={value} is part of chunk attention; give a window too: window=1")

    @property
    def chunks(self) -> bool:
        """Whether visual queries are restricted in refreshes."""
        return self.window >= 0

    def entries(self, layers: int) -> list[int]:
        """Where the groups begin."""
        return list(range(self.group, layers, self.group))

    def plan(self, context: StepContext) -> Plan:
        """Answer always; text and frames from the lowest group that is due."""
        probes = self.probes if self.drift else 0
        if context.step == 0:
            chunked, search = self.chunk_first and self.chunks, self.anchors != 0 and self.chunks
            return Plan(EVERYTHING, chunked=chunked, search=search, probes=probes)
        start = dict(ANSWER)
        schedules = (("text", self.text, self.text_pyramid), ("visual", self.text * self.ratio, self.pyramid))
        for segment, interval, pyramid in schedules:
            if self.drift:
                due = self._drifted_groups(context, segment)
            else:
                due = self._due_groups(context.layers, context.step, interval, pyramid)
            if due:
                start[segment] = min(due)
        return Plan(start, chunked=self.chunks, probes=probes, store_states=start != ANSWER)

    def check(self, frames: int, visual: int) -> None:
        """Refuse more anchors than visual tokens, and a window larger than a video of several frames."""
        if not self.chunks or not frames:
            return
        if self.anchors is not None and self.anchors > visual:
            raise InputError(f"cache mars: {self.anchors} anchors are more than the {visual} visual tokens; use fewer")
        if 1 < frames <= self.window:  # a single image may have any: its queries see all of it
            raise InputError(
                f"cache mars: a window of {self.window} is larger than the video of {frames} frames; "
                f"use a smaller one, or -1 for full attention"
            )

    def attention(self, frames: FrameMap, prompt: Tensor) -> AttentionPattern:
        """Chunk attention where there are several frames and a window; else full attention."""
        sizes = frames.sizes
        if not self.chunks or len(sizes) < 2:
            return AttentionPattern()
        window = min(self.window, len(sizes) - 1)
        anchors = min(DEFAULT_ANCHORS if self.anchors is None else self.anchors, sum(sizes))
        scenes = scenes_of(_frame_means(frames, prompt) if self.scene else prompt, sizes, self.scene)
        fused = can_fuse(prompt.device) if self.fused is None else self.fused
        return ChunkPattern(frames, window, anchors, self.queries, self.per_head, scenes, fused)

    def _drifted_groups(self, context: StepContext, segment: str) -> list[int]:
        """Entries of the groups where a segment has drifted too far."""
        entries = [0, *self.entries(context.layers)]
        drifts = context.drift.get(segment, [0.0] * len(entries))
        return [entry for entry, drift in zip(entries, drifts, strict=True) if drift > self.drift]

    def _due_groups(self, layers: int, step: int, interval: int, pyramid: int) -> list[int]:
        """Entries of the groups that are due at a step."""
        firsts = [0, *self.entries(layers)]
        return [
            first
            for depth, first in enumerate(reversed(firsts))  # 0 is the deepest
            if step % (interval * pyramid**depth) == 0
        ]


def _frame_means(frames: FrameMap, prompt: Tensor) -> Tensor:
    """Mean embedding of every frame: (frames, width)."""
    return torch.stack([part.mean(0) for part in prompt[frames.visual].split(list(frames.sizes))])


class ChunkPattern(AttentionPattern):
    """Visual queries attend to their neighbourhood, anchors and text; all other queries attend to everything.

    Args:
        frames: where the frames are.
        window: neighbours on either side.
        anchor_count: anchors to keep; 0 for none.
        queries: visual queries sampled in the search for anchors.
        per_head: anchors of each key/value head instead of each layer.
        scenes: numbers of the visual tokens of every scene; each gets an equal share of anchors and queries.
        fused: run chunk attention as one kernel instead of on gathered blocks.
    """

    def __init__(
        self,
        frames: FrameMap,
        window: int,
        anchor_count: int,
        queries: int,
        per_head: bool,
        scenes: tuple[Tensor, ...],
        fused: bool = False,
    ):
        super().__init__()
        self.frames, self.window, self.anchor_count, self.queries = frames, window, anchor_count, queries
        self.per_head, self.scenes, self.fused = per_head, scenes, fused
        self.visual_start: int | None = None
        self.chunked = self.search = False
        self.kernel: FusedChunks | None = None
        self.ordered: tuple[Tensor, Tensor] | None = None  # active positions, and their order with visual ones first

    def prune(self, frames: FrameMap, numbers: np.ndarray) -> None:
        """Every layer finds anchors among what is left when it is next refreshed."""
        super().prune(frames, numbers)
        ends = np.cumsum([len(scene) for scene in self.scenes])[:-1]
        left = torch.arange(len(numbers), device=frames.visual.device)
        scenes = left.tensor_split(np.searchsorted(numbers, ends).tolist())
        self.scenes = tuple(scene for scene in scenes if len(scene))
        self.frames, self.kernel, self.ordered = frames, None, None
        self.window = min(self.window, len(frames.sizes) - 1)
        self.anchor_count = min(self.anchor_count, len(numbers))

    def begin_pass(self, plan: Plan, block: Tensor) -> None:
        """Note from which layer on the visual tokens are recomputed (single ones that are probed see everything)."""
        self.visual_start = plan.start.get("visual")
        self.chunked, self.search = plan.chunked, plan.search

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, layer: int, active: Tensor) -> Tensor:
        """See `AttentionPattern`."""
        # decided by the plan, not by the tensors: reading those would make the host wait for a GPU in every layer
        if self.visual_start is None or layer < self.visual_start or not (self.chunked or self.search):
            return attend_grouped(queries, keys, values)
        if len(active) < sum(len(positions) for start, positions in self.joins.items() if start <= layer):
            return attend_grouped(queries, keys, values)  # in the last layer only the answer asks
        visual = self.frames.visual
        order = self._visual_first(active)
        visual_queries = queries.index_select(1, order[: len(visual)])
        if self.search or (self.anchor_count and layer not in self.anchors):
            best = [self._find_anchors(visual_queries[:, scene], keys[:, visual[scene]]) for scene in self.scenes]
            self.anchors[layer] = torch.cat(
                [visual[scene][chosen] for scene, chosen in zip(self.scenes, best, strict=True)], dim=-1
            )
        if not self.chunked:
            return attend_grouped(queries, keys, values)
        mixed = torch.empty_like(queries)
        mixed.index_copy_(1, order[: len(visual)], self._chunks(visual_queries, keys, values, self.anchors.get(layer)))
        if len(visual) < len(active):
            rest = order[len(visual) :]
            mixed.index_copy_(1, rest, attend_grouped(queries.index_select(1, rest), keys, values))
        return mixed

    def _visual_first(self, active: Tensor) -> Tensor:
        """Places of the active positions, those of all visual tokens first; once for every set, without asking a GPU
        how many they are."""
        if self.ordered is None or self.ordered[0] is not active:
            self.ordered = active, (self.frames.frame_of[active] < 0).int().argsort(stable=True)
        return self.ordered[1]

    def _chunks(self, queries: Tensor, keys: Tensor, values: Tensor, anchors: Tensor | None) -> Tensor:
        """Chunk attention of all visual queries."""
        if not self.fused:
            return chunked_attention(queries, keys, values, self.frames, self.window, anchors)
        if self.kernel is None:
            self.kernel = FusedChunks(
                self.frames, self.window, len(queries), 0 if anchors is None else anchors.shape[-1]
            )
        try:
            return self.kernel(queries, keys, values, anchors)
        except FailOnRecompileLimitHit:
            log.warning("FlexAttention met too many shapes; chunk attention now runs on gathered blocks")
            self.fused = False
            return self._chunks(queries, keys, values, anchors)

    def _find_anchors(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Anchors of one scene, as numbers of its tokens."""
        tokens, share = keys.shape[1], len(self.scenes)
        sampled = torch.linspace(0, tokens - 1, min(max(1, self.queries // share), tokens), device=keys.device).long()
        return find_anchors(queries[:, sampled], keys, min(max(1, self.anchor_count // share), tokens), self.per_head)
