"""The cache of one request: its policy, its KV cache, and what the next pass recomputes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidlada.decoding.attention import FrameMap, upload
from vidlada.decoding.kv_cache import KVCache, PartialPass, concatenate
from vidlada.decoding.policies.base import EVERYTHING, AttentionPattern, Plan, Policy, StepContext
from vidlada.decoding.pruning import ObservedAttention
from vidlada.decoding.small_kv import kv_cache_of
from vidlada.errors import InputError
from vidlada.model.config import VidLaDATextConfig


@dataclass(frozen=True)
class VisualCache:
    """Keys, values and states of a video's tokens, reused by a further question about the same video.

    Attributes:
        layout: frame of each position of the sequence up to the last visual one, -1 for text; the same in every request
            that may reuse them.
        layers: of the lowest layers, as many as are reused, (2 × key/value heads, visual tokens, head_dim): keys, and
            below them values.
        hidden: layer → (visual tokens, width) states entering it, up to the first layer that is not reused.
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
        visual: of an earlier request; the first step then computes the frames only from layer `reuse` on. Ignored where
            the frames have other positions, or the states of other layers are needed.
        reuse: layers, from the lowest, whose keys and values of the frames are taken from `visual` and left for others.
        devices: of the layers, where the model is spread over several.
        observe: find out in the first pass what the masked answer attends to, for `prune`.
        kv_dtype: as in `GenerationSettings`.
        heads: of keys and values in this process; the model's by default.
        spare: as of `KVCache`.

    Raises:
        InputError: the policy does not fit this request, or not a model that is spread over devices.
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
        reuse: int = 0,
        devices: Sequence[torch.device] | None = None,
        observe: bool = False,
        kv_dtype: str = "auto",
        heads: int | None = None,
        spare: int = 0,
    ):
        self.spare = spare
        self.config, self.policy, self.prompt, self.devices, self.kv_dtype = config, policy, prompt, devices, kv_dtype
        index = np.full(tokens, -1)
        index[: len(frame_index)] = frame_index
        self.arrange(index, len(prompt), slots)
        self.observe = observe and bool((index >= 0).any())
        self.observed: ObservedAttention | None = None
        self.exported: VisualCache | None = None  # before tokens were dropped
        self.heads = heads or config.num_key_value_heads
        self.kv_cache: KVCache | None = None
        self.step, self.step_in_block, self.block = 0, -1, slice(0, 0)
        self.refreshes = {"text": 0, "visual": 0}
        self.masked = torch.ones(slots, dtype=torch.bool)  # in the last pass; on the CPU
        self.undecided = self.masked
        self.attention = policy.attention(self.frames, prompt)
        self.repeatable = True  # the last pass would do the same if it ran again
        # of policies that refresh by measured drift
        self.probes = torch.empty(0, dtype=torch.long)  # positions
        self.probed: dict[str, slice] = {}  # segment → its part of them
        self.refreshed_from: dict[str, int] = {}
        self.references: Tensor | None = None
        self.drift: dict[str, list[float]] = {}
        self.reuse = min(reuse, config.num_hidden_layers)
        self.entries = sorted({*policy.entries(config.num_hidden_layers), self.reuse} - {0, config.num_hidden_layers})
        layers = {layer for layer in self.entries if layer <= self.reuse}
        self.layout = tuple(index[: 1 + np.flatnonzero(index >= 0).max(initial=-1)].tolist())
        self.reused: VisualCache | None = None
        if visual is not None and visual.hidden.keys() == layers and visual.layout == self.layout:
            self.reused = visual if 0 < self.reuse == len(visual.layers) else None
        if len(set(devices or ())) > 1 and type(self.attention) is not AttentionPattern:
            raise InputError(f"cache {policy.name} runs on a single device; spread the model over none, or use dual")
        self.check_heads()

    def check_heads(self) -> None:
        """Refuse, where another process has some of the heads, what is decided by all of them."""
        if self.heads == self.config.num_key_value_heads:
            return
        plan = self.policy.plan(StepContext(1, 1, self.config.num_hidden_layers))
        if type(self.attention) is not AttentionPattern or plan.narrow is not None or plan.probes:
            raise InputError(
                f"cache {self.policy.name} decides by the heads of all processes; with tensor parallelism use prefix, "
                f"dual, frozen, dkv, or mars without window and drift"
            )
        if self.observe:
            raise InputError("visual_prune decides by the heads of all processes; it excludes tensor parallelism")

    def arrange(self, index: np.ndarray, first: int, slots: int) -> None:
        """Note where frames, text and answer stand.

        Args:
            index: frame of each position, -1 for none.
            first: where the answer begins.
            slots: of the answer.
        """
        self.index, self.first, device = index, first, self.prompt.device
        positions = np.arange(len(index))
        is_answer = (positions >= first) & (positions < first + slots)
        self.frames = FrameMap.from_frame_index(index, device)
        own = upload({"answer": positions[is_answer], "text": positions[(index < 0) & ~is_answer]}, device)
        self.answer, self.text = own["answer"], own["text"]

    def segment(self, name: str) -> Tensor:
        """Positions of a segment of `vidlada.decoding.policies.base.SEGMENTS`, or of what is undecided."""
        if name == "undecided":
            places = self.undecided.nonzero()[:, 0].numpy() + self.first
            return upload({"": places}, self.answer.device)[""]
        answer = {
            "before": slice(0, self.block.start),
            "block": self.block,
            "after": slice(self.block.stop, len(self.answer)),
        }
        if name in answer:
            return self.answer[answer[name]]
        return self.text if name == "text" else self.frames.visual

    def next_pass(self, answer: Tensor, block: slice, masked: Tensor, embed: nn.Module, suffix: Tensor) -> PartialPass:
        """What the next pass recomputes.

        Args:
            answer: (slots,) ids of the answer as it stands.
            block: slots of the current block.
            masked: boolean (slots,) on the CPU: still open.
            embed: ids to embeddings.
            suffix: ids of the fixed tokens after the answer.
        """
        self.undecided, self.masked = self.masked | masked, masked.clone()
        self.step_in_block = self.step_in_block + 1 if block == self.block else 0
        self.block = block
        plan = self.policy.plan(StepContext(self.step, self.step_in_block, self.config.num_hidden_layers, self.drift))
        if self.kv_cache is None:
            after = embed(torch.cat((answer, suffix)))
            embeddings = torch.cat((self.prompt.to(after.dtype), after))
            self.kv_cache = kv_cache_of(self.kv_dtype)(
                self.config, embeddings, self.entries, self.devices, self.heads, spare=self.spare
            )
            plan = replace(plan, start=self.reuse_visual(self.kv_cache), narrow=None)
            if self.observe:
                asking = upload({"": masked.nonzero()[:, 0].numpy() + self.first}, self.answer.device)[""]
                self.observed = ObservedAttention(self.attention, asking, self.frames.visual)
        observed = self.observed if self.step == 0 else None
        self.step += 1
        # what changed most is found by comparing with values that the pass overwrites
        self.repeatable = plan.narrow is None and plan.layerwise in (None, 1.0)
        for segment in self.refreshes:
            self.refreshes[segment] += segment in plan.start
        joins: dict[int, list[Tensor]] = {}
        answers_first = sorted(plan.start.items(), key=lambda item: item[0] in self.refreshes)
        for segment, start in answers_first:
            joins.setdefault(start, []).append(self.segment(segment))
        wanted = self.wanted_positions(plan, joins)
        self.add_probes(plan, joins)
        self.attention.begin_pass(plan, self.segment("block"))
        self.attention.joins = {start: concatenate(positions) for start, positions in joins.items()}
        return PartialPass(
            self.kv_cache,
            self.attention.joins,
            observed or self.attention,
            None if plan.narrow is None else max(1, round(plan.narrow * len(self.answer))),
            (answer, slice(self.first, self.first + len(answer))),
            self.attention.compact,
            wanted,
            plan.store_states,
        )

    def wanted_positions(self, plan: Plan, joins: dict[int, list[Tensor]]) -> int | None:
        """How many of a pass's positions, the first ones, are the answer's: nobody reads what leaves the last layer of
        the others. None where the answer does not come first, or only a part of it goes on, and where the others are a
        few probes: to leave them out would take longer than to let them through."""
        if plan.probes and self.refreshes.keys().isdisjoint(plan.start):
            return None
        starts = [start for segment, start in plan.start.items() if segment not in self.refreshes]
        if self.attention.whole or plan.narrow is not None or not starts or set(starts) != {min(plan.start.values())}:
            return None
        return sum(map(len, joins[starts[0]][: len(starts)]))

    def write_back(self) -> KVCache:
        """The KV cache, with the block's keys and values of passes that wrote them into `compact` alone."""
        assert self.kv_cache is not None
        for layer, compact in self.attention.compact.items():
            block = self.segment("block")
            self.kv_cache.write(layer, block, compact[:, : len(block)])
        return self.kv_cache

    def reuse_visual(self, kv_cache: KVCache) -> dict[str, int]:
        """Copy an earlier request's visual states in; returns what the first step still has to compute."""
        if self.reused is None:
            return EVERYTHING
        positions = self.frames.visual
        for layer, states in enumerate(self.reused.layers):
            kv_cache.write(layer, positions.to(states.device), states)
        for layer, states in self.reused.hidden.items():
            kv_cache.hidden[layer].index_copy_(0, positions.to(states.device), states)
        self.attention.anchors = dict(self.reused.anchors)
        start = {segment: start for segment, start in EVERYTHING.items() if segment != "visual"}
        return start | ({"visual": self.reuse} if self.reuse < self.config.num_hidden_layers else {})

    def export_visual(self) -> VisualCache | None:
        """The visual tokens' part, for a further question about the same video; None before the first step."""
        if self.kv_cache is None or self.exported is not None:
            return self.exported
        positions, kv_cache = self.frames.visual, self.kv_cache
        layers = [kv_cache.select(layer, positions.to(kv_cache.devices[layer])) for layer in range(self.reuse)]
        hidden = {
            layer: states.index_select(0, positions.to(states.device))
            for layer, states in kv_cache.hidden.items()
            if 0 < layer <= self.reuse and layer < self.config.num_hidden_layers
        }
        anchors = {layer: found for layer, found in self.attention.anchors.items() if layer < self.reuse}
        return VisualCache(self.layout, layers, hidden, anchors)

    def prune(self, numbers: np.ndarray) -> None:
        """Drop visual tokens after a pass. What is left keeps its position ids, frames and states.

        Args:
            numbers: ascending, of those that are left, counted frame after frame.
        """
        assert self.kv_cache is not None
        if self.reuse:  # another question may need what this one does not
            self.exported = self.export_visual()
        (visual,) = (self.index >= 0).nonzero()
        visual = visual[np.argsort(self.index[visual], kind="stable")]
        is_left = self.index < 0
        is_left[visual[numbers]] = True
        (places,) = is_left.nonzero()
        self.kv_cache.keep(upload({"": places}, self.answer.device)[""])
        self.arrange(self.index[places], int((places < self.first).sum()), len(self.answer))
        self.attention.prune(self.frames, numbers)
        self.probed.clear()
        self.references = None

    def add_probes(self, plan: Plan, joins: dict[int, list[Tensor]]) -> None:
        """Recompute a few positions of the segments that are not refreshed, to measure how far they moved."""
        self.refreshed_from = {segment: plan.start[segment] for segment in self.refreshes if segment in plan.start}
        if not plan.probes:
            return
        if not self.probed:
            parts: list[Tensor] = []
            for segment in self.refreshes:
                positions, first = self.segment(segment), sum(map(len, parts))
                spread = torch.linspace(0, len(positions) - 1, min(plan.probes, len(positions)))
                parts.append(positions[upload({"": spread.long().numpy()}, positions.device)[""]])
                self.probed[segment] = slice(first, first + len(spread))
            self.probes = torch.cat(parts)
        for segment, own in self.probed.items():
            if segment not in self.refreshed_from:
                joins.setdefault(0, []).append(self.probes[own])

    def compare_probes(self) -> Tensor | None:
        """Compare the probed values of the pass that just ran with those of their last refresh, at every entry.

        Returns:
            1 - cosine of each, (entries × probes,) float64, for `take_drift`; None if nothing is probed.
        """
        if not self.probed:
            return None
        assert self.kv_cache is not None
        entries, parts = [0, *self.policy.entries(self.config.num_hidden_layers)], []
        for entry in entries:
            states = self.kv_cache.select(entry, self.probes.to(self.kv_cache.devices[entry]))
            parts.append(states.chunk(2)[1].transpose(0, 1).to(self.probes.device))
        values = torch.stack(parts).flatten(2).float()  # (entries, probes, key/value heads × head_dim)
        if self.references is None:
            self.references = F.normalize(values, dim=-1)
        for segment, own in self.probed.items():
            if segment in self.refreshed_from:
                # a refresh from some layer up leaves what lies below as the earlier one left it
                kept = sum(entry < self.refreshed_from[segment] for entry in entries)
                self.references[kept:, own] = F.normalize(values[kept:, own], dim=-1)
        lengths = torch.linalg.vector_norm(values, dim=-1).clamp_min_(torch.finfo(values.dtype).tiny)
        return (1 - (values * self.references).sum(-1) / lengths).flatten().double()

    def take_drift(self, distances: Tensor) -> None:
        """Note what `compare_probes` found, for the next plan.

        Args:
            distances: (entries × probes,).
        """
        drifts = distances.unflatten(0, (-1, len(self.probes)))  # (entries, probes)
        self.drift = {segment: drifts[:, own].mean(1).tolist() for segment, own in self.probed.items()}

    def block_states(self, block: slice) -> Tensor:
        """Final normed states of the block's positions: (block, width)."""
        assert self.kv_cache is not None
        return self.kv_cache.hidden[self.config.num_hidden_layers][self.first + block.start : self.first + block.stop]
