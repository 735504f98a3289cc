"""The cache of one request: its policy, its store, and what the next pass recomputes."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vidlada.config import VidLaDATextConfig
from vidlada.decoding.attention import FrameMap, scenes_of
from vidlada.decoding.fused import can_fuse
from vidlada.decoding.patterns import FramePattern, SparsePattern
from vidlada.decoding.policies import EVERYTHING, Mars, Moment, Plan, Policy, Sparse
from vidlada.decoding.store import Pattern, Store, Work, see_everything
from vidlada.errors import InputError

DEFAULT_ANCHORS = 64


@dataclass(frozen=True)
class VisualStates:
    """What a request leaves of its frames, for a further question about the same video.

    Attributes:
        positions: (visual tokens,) places in the sequence; the same in every request that may take them over.
        keys, values: (layers, key/value heads, visual tokens, head_dim).
        hidden: layer → (visual tokens, width) states entering it.
        anchors: layer → positions of its anchors.
    """

    positions: Tensor
    keys: Tensor
    values: Tensor
    hidden: dict[int, Tensor]
    anchors: dict[int, Tensor]


class Cache:
    """What one request keeps between steps.

    Args:
        config: of the language model.
        policy: when to recompute what.
        prompt: (tokens, width) embeddings, visual tokens spliced in.
        frame_index: (tokens of the prompt,) frame of each position, -1 for text.
        slots: answer slots.
        tokens: length of the whole sequence, suffix included.
        visual: left by an earlier request; the first step then leaves the frames alone. Ignored where the frames stand
            elsewhere or the policy keeps other layers.

    Raises:
        InputError: the policy does not fit this request.
    """

    def __init__(
        self,
        config: VidLaDATextConfig,
        policy: Policy,
        prompt: Tensor,
        frame_index: Tensor,
        slots: int,
        tokens: int,
        visual: VisualStates | None = None,
    ):
        self.config, self.policy, self.prompt = config, policy, prompt
        rest = frame_index.new_full((tokens - len(frame_index),), -1)
        self.frames = FrameMap.from_frame_index(torch.cat((frame_index, rest)))
        self.answer = torch.arange(len(prompt), len(prompt) + slots, device=prompt.device)
        is_answer = torch.zeros(tokens, dtype=torch.bool, device=prompt.device)
        is_answer[self.answer] = True
        self.text = self.frames.others[~is_answer[self.frames.others]]
        self.store: Store | None = None
        self.step, self.step_in_block, self.block = 0, -1, slice(0, 0)
        self.refreshes = {"text": 0, "visual": 0}
        self.probed: dict[str, Tensor] = {}
        self.renewed: dict[str, int] = {}
        self.references: dict[str, Tensor] = {}
        self.drift: dict[str, list[float]] = {}
        self.frame_pattern = self._frame_pattern(policy)
        self.sparse_pattern: SparsePattern | None = None
        self.pattern: Pattern = see_everything  # of policies that bring none
        layers = {*policy.entries(config.num_hidden_layers), config.num_hidden_layers}
        if visual is not None and (
            visual.hidden.keys() != layers or not torch.equal(visual.positions, self.frames.visual)
        ):
            visual = None
        self.given = visual

    def _frame_pattern(self, policy: Policy) -> FramePattern | None:
        if not isinstance(policy, Mars) or not policy.chunks or not len(self.frames.positions):
            return None
        visual, frames = len(self.frames.visual), len(self.frames.positions)
        anchors = min(DEFAULT_ANCHORS, visual) if policy.anchors is None else policy.anchors
        if anchors > visual:
            raise InputError(f"cache mars: {anchors} anchors are more than the {visual} visual tokens; use fewer")
        if policy.window and policy.window >= frames:
            raise InputError(
                f"cache mars: a window of {policy.window} is larger than the video of {frames} frames; "
                f"use a smaller one, or -1 for full attention"
            )
        sizes = self.frames.valid.sum(1)
        means = torch.stack([part.mean(0) for part in self.prompt[self.frames.visual].split(sizes.tolist())])
        scenes = scenes_of(means, sizes, policy.scene)
        fused = can_fuse(self.prompt.device) if policy.fused is None else policy.fused
        return FramePattern(self.frames, policy.window, anchors, policy.queries, policy.per_head, scenes, fused)

    def segments(self) -> dict[str, Tensor]:
        """Positions of each segment of `vidlada.decoding.policies.SEGMENTS`."""
        return {
            "text": self.text,
            "visual": self.frames.visual,
            "before": self.answer[: self.block.start],
            "block": self.answer[self.block],
            "after": self.answer[self.block.stop :],
        }

    def work(self, answer: Tensor, suffix: Tensor, block: slice) -> Work:
        """What the next pass recomputes.

        Args:
            answer: (slots, width) embeddings of the answer as it stands.
            suffix: (suffix tokens, width) embeddings.
            block: slots of the current block.
        """
        self.step_in_block = self.step_in_block + 1 if block == self.block else 0
        self.block = block
        layers = self.config.num_hidden_layers
        self.measure_drift()
        plan = self.policy.plan(Moment(self.step, self.step_in_block, layers, self.drift))
        if self.store is None:
            embeddings = torch.cat((self.prompt.to(answer.dtype), answer, suffix))
            self.store = Store(self.config, embeddings, self.policy.entries(layers))
            plan = replace(plan, start=self.take_over(self.store), narrow=None)
        else:
            self.store.hidden[0][self.answer] = answer
        self.step += 1
        for segment in self.refreshes:
            self.refreshes[segment] += segment in plan.start
        segments = self.segments()
        joins: dict[int, list[Tensor]] = {}
        for segment, start in plan.start.items():
            joins.setdefault(start, []).append(segments[segment])
        self.probe(plan, joins)
        return Work(
            self.store,
            {start: torch.cat(positions) for start, positions in joins.items()},
            self._pattern(plan, segments["block"]),
            None if plan.narrow is None else max(1, round(plan.narrow * len(self.answer))),
        )

    def take_over(self, store: Store) -> dict[str, int]:
        """Fill the store with what an earlier request left, and tell what the first step has still to compute."""
        if self.given is None:
            return EVERYTHING
        positions = self.given.positions
        store.keys[:, :, positions], store.values[:, :, positions] = self.given.keys, self.given.values
        for layer, states in self.given.hidden.items():
            store.hidden[layer][positions] = states
        if self.frame_pattern is not None:
            self.frame_pattern.found = dict(self.given.anchors)
        return {segment: start for segment, start in EVERYTHING.items() if segment != "visual"}

    def visual_states(self) -> VisualStates | None:
        """What this request leaves of its frames; None before its first step."""
        if self.store is None:
            return None
        positions = self.frames.visual
        hidden = {layer: states[positions] for layer, states in self.store.hidden.items() if layer}
        anchors = {} if self.frame_pattern is None else dict(self.frame_pattern.found)
        return VisualStates(
            positions, self.store.keys[:, :, positions], self.store.values[:, :, positions], hidden, anchors
        )

    def probe(self, plan: Plan, joins: dict[int, list[Tensor]]) -> None:
        """Let a few positions of the segments that rest run along, and note which segments are renewed."""
        self.renewed = {segment: plan.start[segment] for segment in self.refreshes if segment in plan.start}
        for segment in self.refreshes if plan.probes else ():
            positions = self.segments()[segment]
            spread = torch.linspace(0, len(positions) - 1, min(plan.probes, len(positions)), device=positions.device)
            self.probed[segment] = positions[spread.long()]
            if segment not in self.renewed:
                joins.setdefault(0, []).append(self.probed[segment])

    def measure_drift(self) -> None:
        """Compare the probed values of the last pass with those of their renewal, at every entry."""
        entries = [0, *self.policy.entries(self.config.num_hidden_layers)]
        for segment, positions in self.probed.items():
            assert self.store is not None
            values = (
                self.store.values[entries][:, :, positions].transpose(1, 2).flatten(2).float()
            )  # (entries, probes, …)
            if (
                segment in self.renewed or segment not in self.references
            ):  # from some layer up; what lies below rests since an earlier renewal
                rests = sum(entry < self.renewed.get(segment, 0) for entry in entries)
                self.references[segment] = torch.cat((self.references.get(segment, values)[:rests], values[rests:]))
            similarity = F.cosine_similarity(values, self.references[segment], dim=-1)  # (entries, probes)
            self.drift[segment] = (1 - similarity.mean(1)).tolist()

    def _pattern(self, plan: Plan, block: Tensor) -> Pattern:
        if self.frame_pattern is not None:
            self.frame_pattern.renewed_from = plan.start.get("visual")
            self.frame_pattern.chunked, self.frame_pattern.search = plan.chunked, plan.search
            return self.frame_pattern
        if isinstance(self.policy, Sparse):
            if self.step_in_block == 0 or self.sparse_pattern is None:
                self.sparse_pattern = SparsePattern(self.policy.keep, block)
            self.sparse_pattern.select = plan.select
            return self.sparse_pattern
        return self.pattern

    def leaving(self, block: slice) -> Tensor:
        """Normed states of the block's positions as they left the top: (block, width)."""
        assert self.store is not None
        return self.store.hidden[self.config.num_hidden_layers][self.answer[block]]
