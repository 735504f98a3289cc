"""The cache of one request: its policy, its KV cache, and what the next pass recomputes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidlada.decoding.attention import FrameMap, upload
from vidlada.decoding.kv_cache import KVCache, PartialPass, concatenated
from vidlada.decoding.policies.base import EVERYTHING, AttentionPattern, Plan, Policy, StepContext
from vidlada.errors import InputError
from vidlada.model.config import VidLaDATextConfig


@dataclass(frozen=True)
class VisualCache:
    """Keys, values and states of a video's tokens, reused by a further question about the same video.

    Attributes:
        layout: frame of each position of the sequence up to the last visual one, -1 for text; the same in every request
            that may reuse them.
        layers: of every layer, (2 × key/value heads, visual tokens, head_dim): keys, and below them values.
        hidden: layer → (visual tokens, width) states entering it.
        anchors: layer → positions of its anchors.
    """

    layout: tuple[int, ...]
    layers: list[Tensor]
    hidden: dict[int, Tensor]
    anchors: dict[int, Tensor]

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(tensor.nbytes for tensor in (*self.layers, *self.hidden.values()))


class RequestCache:
    """What one request keeps between steps.

    Args:
        config: of the language model.
        policy: when to recompute what.
        prompt: (tokens, width) embeddings, visual tokens spliced in.
        frame_index: frame of each position of the prompt, -1 for text.
        slots: answer slots.
        tokens: length of the whole sequence, suffix included.
        visual: of an earlier request; the first step then does not compute the frames. Ignored where the frames have
            other positions or the policy needs the states of other layers.
        devices: of the layers, where the model is spread over several.

    Raises:
        InputError: the policy does not fit this request.
    """

    def __init__(
        self,
        config: VidLaDATextConfig,
        policy: Policy,
        prompt: Tensor,
        frame_index: Sequence[int],
        slots: int,
        tokens: int,
        visual: VisualCache | None = None,
        devices: Sequence[torch.device] | None = None,
    ):
        self.config, self.policy, self.prompt, self.devices = config, policy, prompt, devices
        index = np.full(tokens, -1)
        index[: len(frame_index)] = frame_index
        self.frames = FrameMap.from_frame_index(index, prompt.device)
        positions, self.first = np.arange(tokens), len(prompt)  # where the answer begins
        is_answer = (positions >= self.first) & (positions < self.first + slots)
        own = upload({"answer": positions[is_answer], "text": positions[(index < 0) & ~is_answer]}, prompt.device)
        self.answer, self.text = own["answer"], own["text"]
        self.kv_cache: KVCache | None = None
        self.step, self.step_in_block, self.block = 0, -1, slice(0, 0)
        self.refreshes = {"text": 0, "visual": 0}
        self.attention = policy.attention(self.frames, prompt)
        # of policies that refresh by measured drift
        self.probed: dict[str, Tensor] = {}
        self.refreshed_from: dict[str, int] = {}
        self.references: dict[str, Tensor] = {}
        self.drift: dict[str, list[float]] = {}
        layers = {*policy.entries(config.num_hidden_layers), config.num_hidden_layers}
        fits = visual is not None and visual.hidden.keys() == layers
        self.layout = tuple(index[: 1 + np.flatnonzero(index >= 0).max(initial=-1)].tolist())
        self.reused = visual if fits and visual.layout == self.layout else None  # type: ignore[union-attr]
        if len(set(devices or ())) > 1 and type(self.attention) is not AttentionPattern:
            raise InputError(f"cache {policy.name} runs on a single device; spread the model over none, or use dual")

    def segments(self) -> dict[str, Tensor]:
        """Positions of each segment of `vidlada.decoding.policies.base.SEGMENTS`."""
        return {
            "text": self.text,
            "visual": self.frames.visual,
            "before": self.answer[: self.block.start],
            "block": self.answer[self.block],
            "after": self.answer[self.block.stop :],
        }

    def next_pass(self, answer: Tensor, block: slice, embed: nn.Module, suffix: Tensor) -> PartialPass:
        """What the next pass recomputes.

        Args:
            answer: (slots,) ids of the answer as it stands.
            block: slots of the current block.
            embed: ids to embeddings.
            suffix: ids of the fixed tokens after the answer.
        """
        self.step_in_block = self.step_in_block + 1 if block == self.block else 0
        self.block = block
        layers = self.config.num_hidden_layers
        self.measure_drift()
        plan = self.policy.plan(StepContext(self.step, self.step_in_block, layers, self.drift))
        if self.kv_cache is None:
            after = embed(torch.cat((answer, suffix)))
            embeddings = torch.cat((self.prompt.to(after.dtype), after))
            self.kv_cache = KVCache(self.config, embeddings, self.policy.entries(layers), self.devices)
            plan = replace(plan, start=self.reuse_visual(self.kv_cache), narrow=None)
        self.step += 1
        for segment in self.refreshes:
            self.refreshes[segment] += segment in plan.start
        segments = self.segments()
        joins: dict[int, list[Tensor]] = {}
        for segment, start in plan.start.items():
            joins.setdefault(start, []).append(segments[segment])
        self.add_probes(plan, joins)
        self.attention.begin_pass(plan, segments["block"])
        return PartialPass(
            self.kv_cache,
            {start: concatenated(positions) for start, positions in joins.items()},
            self.attention,
            None if plan.narrow is None else max(1, round(plan.narrow * len(self.answer))),
            (answer, slice(self.first, self.first + len(answer))),
        )

    def reuse_visual(self, kv_cache: KVCache) -> dict[str, int]:
        """Copy an earlier request's visual states in; returns what the first step still has to compute."""
        if self.reused is None:
            return EVERYTHING
        positions = self.frames.visual
        for own, states in zip(kv_cache.layers, self.reused.layers, strict=True):
            own.index_copy_(1, positions.to(own.device), states)
        for layer, states in self.reused.hidden.items():
            kv_cache.hidden[layer].index_copy_(0, positions.to(states.device), states)
        self.attention.anchors = dict(self.reused.anchors)
        return {segment: start for segment, start in EVERYTHING.items() if segment != "visual"}

    def export_visual(self) -> VisualCache | None:
        """The visual tokens' part, for a further question about the same video; None before the first step."""
        if self.kv_cache is None:
            return None
        positions, kv_cache = self.frames.visual, self.kv_cache
        layers = [states.index_select(1, positions.to(states.device)) for states in kv_cache.layers]
        hidden = {n: states[positions.to(states.device)] for n, states in kv_cache.hidden.items() if n}
        return VisualCache(self.layout, layers, hidden, dict(self.attention.anchors))

    def add_probes(self, plan: Plan, joins: dict[int, list[Tensor]]) -> None:
        """Recompute a few positions of the segments that are not refreshed, to measure how far they moved."""
        self.refreshed_from = {segment: plan.start[segment] for segment in self.refreshes if segment in plan.start}
        for segment in self.refreshes if plan.probes else ():
            positions = self.segments()[segment]
            if segment not in self.probed:
                spread = torch.linspace(0, len(positions) - 1, min(plan.probes, len(positions)))
                self.probed[segment] = positions[upload({"": spread.long().numpy()}, positions.device)[""]]
            if segment not in self.refreshed_from:
                joins.setdefault(0, []).append(self.probed[segment])

    def measure_drift(self) -> None:
        """Compare the probed values of the last pass with those of their last refresh, at every entry."""
        entries = [0, *self.policy.entries(self.config.num_hidden_layers)]
        for segment, positions in self.probed.items():
            assert self.kv_cache is not None
            # (entries, probes, key/value heads × head_dim)
            found = [self.kv_cache.values[entry] for entry in entries]
            values = torch.stack([own[:, positions.to(own.device)].to(positions.device) for own in found])
            values = values.transpose(1, 2).flatten(2).float()
            if segment in self.refreshed_from or segment not in self.references:
                # a refresh from some layer up leaves what lies below as the earlier one left it
                kept = sum(entry < self.refreshed_from.get(segment, 0) for entry in entries)
                self.references[segment] = torch.cat((self.references.get(segment, values)[:kept], values[kept:]))
            similarity = F.cosine_similarity(values, self.references[segment], dim=-1)  # (entries, probes)
            self.drift[segment] = (1 - similarity.mean(1)).tolist()

    def block_states(self, block: slice) -> Tensor:
        """Final normed states of the block's positions: (block, width)."""
        assert self.kv_cache is not None
        return self.kv_cache.hidden[self.config.num_hidden_layers][self.first + block.start : self.first + block.stop]
