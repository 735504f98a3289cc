"""The cache of one request: its policy, its KV cache, and what the next pass recomputes."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vidlada.decoding.attention import FrameMap
from vidlada.decoding.kv_cache import KVCache, PartialPass
from vidlada.decoding.policies.base import EVERYTHING, Plan, Policy, StepContext
from vidlada.model.config import VidLaDATextConfig


@dataclass(frozen=True)
class VisualCache:
    """Keys, values and states of a video's tokens, reused by a further question about the same video.

    Attributes:
        positions: (visual tokens,) in the sequence; the same in every request that may reuse them.
        keys, values: (layers, key/value heads, visual tokens, head_dim) of the lowest layers, as many as are reused.
        hidden: layer → (visual tokens, width) states entering it, up to the first layer that is not reused.
        anchors: layer → positions of its anchors.
    """

    positions: Tensor
    keys: Tensor
    values: Tensor
    hidden: dict[int, Tensor]
    anchors: dict[int, Tensor]

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(tensor.nbytes for tensor in (self.keys, self.values, *self.hidden.values()))


class RequestCache:
    """What one request keeps between steps.

    Args:
        config: of the language model.
        policy: when to recompute what.
        prompt: (tokens, width) embeddings, visual tokens spliced in.
        frame_index: (tokens of the prompt,) frame of each position, -1 for text.
        slots: answer slots.
        tokens: length of the whole sequence, suffix included.
        visual: of an earlier request; the first step then computes the frames only from layer `reuse` on. Ignored where
            the frames have other positions, or the states of other layers are needed.
        reuse: layers, from the lowest, whose keys and values of the frames are taken from `visual` and left for others.

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
        visual: VisualCache | None = None,
        reuse: int = 0,
    ):
        self.config, self.policy, self.prompt = config, policy, prompt
        rest = frame_index.new_full((tokens - len(frame_index),), -1)
        self.frames = FrameMap.from_frame_index(torch.cat((frame_index, rest)))
        self.answer = torch.arange(len(prompt), len(prompt) + slots, device=prompt.device)
        is_answer = torch.zeros(tokens, dtype=torch.bool, device=prompt.device)
        is_answer[self.answer] = True
        self.text = self.frames.others[~is_answer[self.frames.others]]
        self.kv_cache: KVCache | None = None
        self.step, self.step_in_block, self.block = 0, -1, slice(0, 0)
        self.refreshes = {"text": 0, "visual": 0}
        self.masked = torch.ones(slots, dtype=torch.bool, device=prompt.device)  # in the last pass
        self.undecided = self.masked
        self.attention = policy.attention(self.frames, prompt)
        # of policies that refresh by measured drift
        self.probed: dict[str, Tensor] = {}
        self.refreshed_from: dict[str, int] = {}
        self.references: dict[str, Tensor] = {}
        self.drift: dict[str, list[float]] = {}
        self.reuse = min(reuse, config.num_hidden_layers)
        self.entries = sorted({*policy.entries(config.num_hidden_layers), self.reuse} - {0, config.num_hidden_layers})
        layers = {layer for layer in (*self.entries, config.num_hidden_layers) if layer <= self.reuse}
        fits = visual is not None and self.reuse and len(visual.keys) == self.reuse and visual.hidden.keys() == layers
        self.reused = visual if fits and torch.equal(visual.positions, self.frames.visual) else None  # type: ignore[union-attr]

    def segments(self) -> dict[str, Tensor]:
        """Positions of each segment of `vidlada.decoding.policies.base.SEGMENTS`."""
        return {
            "text": self.text,
            "visual": self.frames.visual,
            "before": self.answer[: self.block.start],
            "block": self.answer[self.block],
            "after": self.answer[self.block.stop :],
            "undecided": self.answer[self.undecided],
        }

    def next_pass(self, answer: Tensor, suffix: Tensor, block: slice, masked: Tensor) -> PartialPass:
        """What the next pass recomputes.

        Args:
            answer: (slots, width) embeddings of the answer as it stands.
            suffix: (suffix tokens, width) embeddings.
            block: slots of the current block.
            masked: boolean (slots,): still open.
        """
        self.undecided, self.masked = self.masked | masked, masked.clone()
        self.step_in_block = self.step_in_block + 1 if block == self.block else 0
        self.block = block
        layers = self.config.num_hidden_layers
        self.measure_drift()
        plan = self.policy.plan(StepContext(self.step, self.step_in_block, layers, self.drift))
        if self.kv_cache is None:
            embeddings = torch.cat((self.prompt.to(answer.dtype), answer, suffix))
            self.kv_cache = KVCache(self.config, embeddings, self.entries)
            plan = replace(plan, start=self.reuse_visual(self.kv_cache), narrow=None)
        else:
            self.kv_cache.hidden[0][self.answer] = answer
        self.step += 1
        for segment in self.refreshes:
            self.refreshes[segment] += segment in plan.start
        segments = self.segments()
        joins: dict[int, list[Tensor]] = {}
        for segment, start in plan.start.items():
            joins.setdefault(start, []).append(segments[segment])
        self.add_probes(plan, joins)
        self.attention.begin_pass(plan, segments["block"])
        self.attention.joins = {start: torch.cat(positions) for start, positions in joins.items()}
        return PartialPass(
            self.kv_cache,
            self.attention.joins,
            self.attention,
            None if plan.narrow is None else max(1, round(plan.narrow * len(self.answer))),
        )

    def reuse_visual(self, kv_cache: KVCache) -> dict[str, int]:
        """Copy an earlier request's visual states in; returns what the first step still has to compute."""
        if self.reused is None:
            return EVERYTHING
        positions, layers = self.reused.positions, self.reuse
        kv_cache.keys[:layers, :, positions] = self.reused.keys
        kv_cache.values[:layers, :, positions] = self.reused.values
        for layer, states in self.reused.hidden.items():
            kv_cache.hidden[layer][positions] = states
        self.attention.anchors = dict(self.reused.anchors)
        start = {segment: start for segment, start in EVERYTHING.items() if segment != "visual"}
        return start | ({"visual": layers} if layers < self.config.num_hidden_layers else {})

    def export_visual(self) -> VisualCache | None:
        """The visual tokens' part, for a further question about the same video; None before the first step."""
        if self.kv_cache is None:
            return None
        positions, kv_cache = self.frames.visual, self.kv_cache
        layers = self.reuse
        hidden = {layer: states[positions] for layer, states in kv_cache.hidden.items() if 0 < layer <= layers}
        anchors = {layer: found for layer, found in self.attention.anchors.items() if layer < layers}
        keys, values = kv_cache.keys[:layers, :, positions], kv_cache.values[:layers, :, positions]
        return VisualCache(positions, keys, values, hidden, anchors)

    def add_probes(self, plan: Plan, joins: dict[int, list[Tensor]]) -> None:
        """Recompute a few positions of the segments that are not refreshed, to measure how far they moved."""
        self.refreshed_from = {segment: plan.start[segment] for segment in self.refreshes if segment in plan.start}
        for segment in self.refreshes if plan.probes else ():
            positions = self.segments()[segment]
            spread = torch.linspace(0, len(positions) - 1, min(plan.probes, len(positions)), device=positions.device)
            self.probed[segment] = positions[spread.long()]
            if segment not in self.refreshed_from:
                joins.setdefault(0, []).append(self.probed[segment])

    def measure_drift(self) -> None:
        """Compare the probed values of the last pass with those of their last refresh, at every entry."""
        entries = [0, *self.policy.entries(self.config.num_hidden_layers)]
        for segment, positions in self.probed.items():
            assert self.kv_cache is not None
            # (entries, probes, key/value heads × head_dim)
            values = self.kv_cache.values[entries][:, :, positions].transpose(1, 2).flatten(2).float()
            if segment in self.refreshed_from or segment not in self.references:
                # a refresh from some layer up leaves what lies below as the earlier one left it
                kept = sum(entry < self.refreshed_from.get(segment, 0) for entry in entries)
                self.references[segment] = torch.cat((self.references.get(segment, values)[:kept], values[kept:]))
            similarity = F.cosine_similarity(values, self.references[segment], dim=-1)  # (entries, probes)
            self.drift[segment] = (1 - similarity.mean(1)).tolist()

    def block_states(self, block: slice) -> Tensor:
        """Final normed states of the block's positions: (block, width)."""
        assert self.kv_cache is not None
        return self.kv_cache.hidden[self.config.num_hidden_layers][self.answer[block]]
