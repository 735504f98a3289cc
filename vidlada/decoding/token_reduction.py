"""Fewer visual tokens: alike ones are merged over time and space before they enter the language model.

After FlashVID and HoliTom: every token may join the token most like it in the frame before (time), or among those that
stand before it in its own frame (space). The most alike pairs are linked until as many trees are left as tokens are to
be kept; a tree becomes one token, the mean of its members, in the place of its first.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vidlada.processor import EncodedConversation


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
    encoded: EncodedConversation, visual_tokens: Tensor, keep: float
) -> tuple[EncodedConversation, Tensor]:
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
