"""How far states move between steps, and where visual queries attend to: the four observations MARS-Cache rests on.

Everything is recomputed in every step, so what is measured is what a cache would have missed by not refreshing.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidlada.decoding.attention import FrameMap, find_anchors
from vidlada.decoding.cache import RequestCache
from vidlada.decoding.kv_cache import attend_grouped
from vidlada.decoding.policies.base import AttentionPattern
from vidlada.decoding.policies.blockwise import Full
from vidlada.decoding.sampler import Denoiser, Request
from vidlada.errors import InputError
from vidlada.markdown import table
from vidlada.model.video_model import VidLaDAForMaskedDiffusion

SAMPLED_QUERIES = 32
ANCHORS = 8


@dataclass(frozen=True)
class EveryLayer(Full):
    """Full recompute that keeps the states entering every layer."""

    def entries(self, layers: int) -> list[int]:
        """All."""
        return list(range(1, layers))


class AttentionProbe(AttentionPattern):
    """Full attention that records where sampled visual queries attend to.

    Args:
        frames: where the frames are.

    Attributes:
        near: layer → share of a query's attention to visual tokens that stays within one frame of its own, each step.
        flatness: layer → entropy of that attention over the entropy of uniform attention, each step.
        on_anchors: layer → share of that attention on the anchors (the tokens all sampled queries look at most).
        kept: layer → share of the anchors that were anchors in the step before.
    """

    whole = True

    def __init__(self, frames: FrameMap):
        super().__init__()
        self.frames = frames
        self.near: dict[int, list[float]] = defaultdict(list)
        self.flatness: dict[int, list[float]] = defaultdict(list)
        self.on_anchors: dict[int, list[float]] = defaultdict(list)
        self.kept: dict[int, list[float]] = defaultdict(list)
        self.last_anchors: dict[int, set[int]] = {}

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, layer: int, active: Tensor) -> Tensor:
        """See `AttentionPattern`."""
        visual = self.frames.visual
        place = torch.full((keys.shape[1],), -1, device=active.device)
        place[active] = torch.arange(len(active), device=active.device)
        chosen = visual[torch.linspace(0, len(visual) - 1, min(SAMPLED_QUERIES, len(visual))).long()]
        sampled, seen = queries[:, place[chosen]].float(), keys[:, visual].float()
        groups = len(queries) // len(keys)
        scores = sampled.unflatten(0, (-1, groups)) @ seen[:, None].transpose(-1, -2) * queries.shape[-1] ** -0.5
        weights = scores.softmax(-1).flatten(0, 1)  # (heads, sampled, visual tokens)
        frame = self.frames.frame_of
        is_near = (frame[chosen][:, None] - frame[visual][None]).abs() <= 1
        self.near[layer].append(float((weights * is_near).sum(-1).mean()))
        uniform = torch.log(torch.tensor(float(len(visual))))
        self.flatness[layer].append(float(torch.special.entr(weights).sum(-1).mean() / uniform))
        best = find_anchors(sampled, seen, min(ANCHORS, len(visual)))
        self.on_anchors[layer].append(float(weights[..., best].sum(-1).mean()))
        found = set(best.tolist())
        if layer in self.last_anchors:
            self.kept[layer].append(len(found & self.last_anchors[layer]) / len(found))
        self.last_anchors[layer] = found
        return attend_grouped(queries, keys, values)


def drift_figures(model: VidLaDAForMaskedDiffusion, request: Request) -> dict[str, Any]:
    """Decode one request and measure, for every layer.

    Args:
        model: in evaluation mode.
        request: with frames and without guidance.

    Returns:
        `layers`: one mapping a layer, with the mean drift between steps (1 - cosine of the states that leave it) of
        `text`, `visual` and `response` (slots whose token did not change), and `near`, `flatness`, `on_anchors`,
        `anchors_kept` of visual attention; `steps`; `chance`: `near` and `on_anchors` of uniform attention.

    Raises:
        InputError: the request has no frames.
    """
    if request.frame_index is None or max(request.frame_index, default=-1) < 0:
        raise InputError("drift is measured on a video; this request has no frames")
    request = replace(request, settings=request.settings.replace(cache=EveryLayer(), cfg_scale=0.0))
    denoiser = Denoiser(model)
    denoiser.add(request)
    cache = denoiser.rows[0].caches[0]
    probe = AttentionProbe(cache.frames)
    cache.attention = probe
    layers = model.language_model.config.num_hidden_layers
    drifts: dict[str, list[list[float]]] = {
        name: [[] for _ in range(layers)] for name in ("text", "visual", "response")
    }
    before: dict[int, Tensor] = {}
    while denoiser.rows:
        denoiser.step()
        assert cache.kv_cache is not None
        after = {layer: states.clone() for layer, states in cache.kv_cache.hidden.items()}
        if before:
            _add_drift(drifts, cache, before, after)
        before = after
    visual = cache.frames.visual
    frame = cache.frames.frame_of[visual]
    return {
        "steps": cache.step,
        "frames": len(cache.frames.positions),
        "visual_tokens": len(visual),
        "chance": {
            "near": float(((frame[:, None] - frame[None]).abs() <= 1).float().mean()),
            "on_anchors": min(ANCHORS, len(visual)) / len(visual),
        },
        "layers": [
            {
                **{name: _mean(values[layer]) for name, values in drifts.items()},
                "near": _mean(probe.near[layer]),
                "flatness": _mean(probe.flatness[layer]),
                "on_anchors": _mean(probe.on_anchors[layer]),
                "anchors_kept": _mean(probe.kept[layer]),
            }
            for layer in range(layers)
        ],
    }


def _add_drift(
    drifts: dict[str, list[list[float]]], cache: RequestCache, before: dict[int, Tensor], after: dict[int, Tensor]
) -> None:
    same = cache.answer[(before[0] == after[0]).all(-1)[cache.answer]]
    for name, positions in (("text", cache.text), ("visual", cache.frames.visual), ("response", same)):
        for layer, found in enumerate(drifts[name]):
            if len(positions):
                similarity = F.cosine_similarity(before[layer + 1][positions], after[layer + 1][positions], dim=-1)
                found.append(float(1 - similarity.mean()))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def drift_table(figures: dict[str, Any]) -> str:
    """Markdown of `drift_figures`."""
    near, on_anchors = (100 * figures["chance"][name] for name in ("near", "on_anchors"))
    head = ("layer", "text drift", "visual drift", "response drift", "near, %", "flatness, %", "on anchors, %",
            "anchors kept, %")  # fmt: skip
    title = (
        f"{figures['frames']} frames, {figures['visual_tokens']} visual tokens, {figures['steps']} steps; drift is "
        f"1 - cosine between one step and the next, times 1000. Uniform attention would have {near:.0f} % near and "
        f"{on_anchors:.1f} % on anchors."
    )
    rows = []
    for number, row in enumerate(figures["layers"]):
        drift = [f"{1000 * row[name]:.2f}" for name in ("text", "visual", "response")]
        shares = [f"{100 * row[name]:.0f}" for name in ("near", "flatness", "on_anchors", "anchors_kept")]
        rows.append([number, *drift, *shares])
    return "\n".join([title, "", *table(head, rows)])
