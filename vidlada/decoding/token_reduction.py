"""Fewer visual tokens: alike ones merged before the language model, and unattended ones dropped after the first step.

Merging is after FlashVID and HoliTom: every token may join the token most like it in the frame before (time), or among
those that stand before it in its own frame (space). The most alike pairs are linked until as many trees are left as
tokens are to be kept; a tree becomes one token, the mean of its members, in the place of its first.

Dropping is RedVTP's (arXiv 2511.12428): in the first step the answer is all masks, and what they attend to hardly
changes afterwards; the visual tokens that they attend to least leave the KV cache. The rest keeps its position ids.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vidlada.decoding.kv_cache import Attention
from vidlada.decoding.named import check_named, parse_named
from vidlada.settings import setting

if TYPE_CHECKING:
    from vidlada.processor import EncodedConversation

QUERIES_AT_ONCE = 32  # whose weights on all keys are in memory together


def merge_tokens(tokens: Tensor, frames: list[int], keep: float) -> tuple[Tensor, Tensor]:
    """Merge the visual tokens of a video.

    Args:
        tokens: (visual tokens, width), frame after frame.
        frames: ascending number of the frame of each.
        keep: share of the tokens that is left, above 0.

    Returns:
        (kept, width) tokens, and the ascending numbers (kept,) of the tokens in whose place they stand.
    """
    total, device = len(tokens), tokens.device
    count = max(1, round(keep * total))
    sizes = torch.tensor(frames).unique_consecutive(return_counts=True)[1].tolist()
    parent, alike = torch.arange(total, device=device), torch.full((total,), -torch.inf, device=device)
    unit, first, before = F.normalize(tokens.float(), dim=-1), 0, 0
    for size in sizes:
        own = slice(first, first + size)
        similarity = unit[own] @ unit[before : first + size].T  # (size, tokens of this frame and the one before)
        earlier = torch.ones_like(similarity, dtype=torch.bool).tril(first - before - 1)
        alike[own], parent[own] = similarity.masked_fill(~earlier, -torch.inf).max(-1)
        parent[own] += before
        before, first = first, first + size
    linked = alike.topk(total - count).indices
    root = torch.arange(total, device=device)
    root[linked] = parent[linked]  # a parent always stands before its child, so there is no circle
    while not torch.equal(root[root], root):
        root = root[root]
    merged = torch.zeros_like(tokens, dtype=torch.float32).index_add_(0, root, tokens.float())
    members = torch.bincount(root, minlength=total)
    kept = members.nonzero()[:, 0]
    return (merged[kept] / members[kept, None]).to(tokens.dtype), kept


def reduce_visual(
    encoded: "EncodedConversation", visual_tokens: Tensor, keep: float
) -> tuple["EncodedConversation", Tensor]:
    """A conversation with fewer visual tokens; what is left keeps its order, its frame and its place among the text.

    Args:
        encoded: as the processor encodes it.
        visual_tokens: (visual tokens, width) of all its videos, in order.
        keep: share of each video's tokens that is left, above 0.
    """
    places = [place for place, frame in enumerate(encoded.frame_index) if frame >= 0]
    starts = [n for n, place in enumerate(places) if n == 0 or place != places[n - 1] + 1]  # text stands between videos
    if not places:
        return encoded, visual_tokens
    parts, left = [], {place for place, frame in enumerate(encoded.frame_index) if frame < 0}
    for start, end in zip(starts, [*starts[1:], len(places)], strict=True):
        frames = [encoded.frame_index[place] for place in places[start:end]]
        merged, kept = merge_tokens(visual_tokens[start:end], frames, keep)
        parts.append(merged)
        left |= {places[start + number] for number in kept.tolist()}
    chosen = sorted(left)
    fewer = {name: [getattr(encoded, name)[place] for place in chosen] for name in PER_POSITION}
    return replace(encoded, **fewer), torch.cat(parts)


PER_POSITION = ("input_ids", "frame_index", "is_answer", "is_control", "turn")


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
