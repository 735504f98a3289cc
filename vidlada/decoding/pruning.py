"""Fewer visual tokens after the first step: RedVTP (arXiv 2511.12428).

In the first step the answer is all masks, and what they attend to hardly changes afterwards; the visual tokens they
attend to least leave the KV cache. The rest keeps its position ids.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidlada.decoding.kv_cache import Attention
from vidlada.decoding.named import check_named, parse_named
from vidlada.settings import setting

QUERIES_AT_ONCE = 32  # whose weights on all keys are in memory together


@dataclass(frozen=True)
class RedVTP:
    """Visual tokens dropped after the first step, by the attention of the answer's masked positions.

    Args:
        keep: share of the visual tokens that is left.
    """

    name: ClassVar[str] = "redvtp"
    keep: float = setting(0.25, "Share of the visual tokens that is left.", above=0, maximum=1)

    def __post_init__(self) -> None:
        check_named("visual_prune", self)

    def count(self, visual: int) -> int:
        """How many of so many visual tokens are left."""
        return max(1, round(self.keep * visual)) if visual else 0


PRUNINGS: dict[str, type] = {RedVTP.name: RedVTP}


def parse_pruning(text: str | None) -> RedVTP | None:
    """A way to drop visual tokens from its name and settings; None for none.

    Raises:
        InputError: an unknown name or setting, or a value out of range.
    """
    return None if text is None or text == "none" else parse_named("visual_prune", text, PRUNINGS, ["none"])


class ObservedAttention:
    """The attention of a request's first pass, which adds up what its masked positions attend to.

    Args:
        attention: to be run.
        asking: (masked,) positions in the answer.
        visual: (visual tokens,) positions.

    Attributes:
        received: (visual tokens,) attention by all layers, heads and masked positions.
    """

    def __init__(self, attention: Attention, asking: Tensor, visual: Tensor):
        self.attention, self.asking, self.visual = attention, asking, visual
        self.received = torch.zeros(len(visual), device=visual.device)
        self.placed: tuple[Tensor, Tensor] | None = None

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, layer: int, active: Tensor) -> Tensor:
        """See `vidlada.decoding.kv_cache.Attention`."""
        if self.placed is None or self.placed[0] is not active:
            self.placed = active, (active[:, None] == self.asking.to(active.device)).int().argmax(0)
        groups, visual = len(queries) // len(keys), self.visual.to(keys.device)
        for places in self.placed[1].split(QUERIES_AT_ONCE):
            asking = queries.index_select(1, places).unflatten(0, (-1, groups)).float()
            scores = asking @ keys[:, None].float().transpose(-1, -2) * queries.shape[-1] ** -0.5
            weights = scores.softmax(-1).sum((0, 1, 2))  # (tokens,)
            self.received += weights.index_select(0, visual).to(self.received.device)
        return self.attention(queries, keys, values, layer, active)

    def most_attended(self, count: int) -> Tensor:
        """Ascending numbers of the visual tokens that received most, (count,)."""
        return self.received.topk(count).indices.sort().values
