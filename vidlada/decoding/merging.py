"""Fewer visual tokens before the language model: alike ones are merged, after FlashVID and HoliTom.

Every cell of the picture may join the one most like it in the frame before (time), or among those that stand before it
in its own frame (space). The most alike pairs are linked until as many tokens are left as are to be kept; linked cells
become one token, their mean, in the place of the first of them.

The newline vectors at the ends of rows are all equal and never merged: a row keeps its own until none of its cells is
left, and is then without it.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vidlada.decoding.attention import upload
from vidlada.model.config import VidLaDAConfig
from vidlada.processor import EncodedConversation
from vidlada.tiling import ImageShape

PER_POSITION = ("input_ids", "frame_index", "is_answer", "is_control", "turn")


def merge_tokens(tokens: Tensor, newlines: np.ndarray, frames: int, keep: float) -> tuple[Tensor, np.ndarray]:
    """Merge the visual tokens of a video or an image.

    Args:
        tokens: (visual tokens, width), frame after frame.
        newlines: boolean (visual tokens,): which of them end a row, a frame or the video.
        frames: how many there are, all with the same number of other tokens.
        keep: share of the tokens that is left, newlines included, above 0.

    Returns:
        (kept, width) tokens, and the ascending numbers (kept,) of the tokens in whose place they stand.
    """
    count, device = max(1, round(keep * len(tokens))), tokens.device
    (cells,) = (~newlines).nonzero()
    pictures = tokens.index_select(0, upload({"": cells}, device)[""]).unflatten(0, (frames, -1))
    alike, parent = (found.numpy() for found in _most_alike(pictures).cpu())  # the host waits, once a medium
    leaves = _order_of_leaving(alike, newlines)
    left = np.ones(len(tokens), dtype=bool)
    left[leaves[: len(tokens) - count]] = False
    root = np.arange(len(tokens))
    root[cells] = np.where(left[cells], cells, cells[parent.astype(np.int64)])
    for _ in range(len(tokens).bit_length()):  # a parent stands before its child, so there is no circle
        root = root[root]
    (kept,), (members,) = left.nonzero(), (left | ~newlines).nonzero()
    group = np.searchsorted(kept, root[members])
    found = upload({"members": members, "group": group, "sizes": np.bincount(group)[:, None]}, device)
    merged = torch.zeros(count, tokens.shape[1], device=device)
    merged.index_add_(0, found["group"], tokens.index_select(0, found["members"]).float())
    return (merged / found["sizes"]).to(tokens.dtype), kept


def _most_alike(pictures: Tensor) -> Tensor:
    """How alike (cosine) every cell is to the one it may join, and the number of that one.

    Args:
        pictures: (frames, cells, width).

    Returns:
        (2, frames × cells) float32; the first cell of all has none to join.
    """
    frames, cells, _ = pictures.shape
    unit = F.normalize(pictures.float(), dim=-1)
    later = torch.ones(cells, cells, dtype=torch.bool, device=unit.device).triu()
    alike, nearest = (unit @ unit.mT).masked_fill_(later, -torch.inf).max(-1)  # (frames, cells), of the same frame
    across, nearest_across = (unit[1:] @ unit[:-1].mT).max(-1)  # (frames - 1, cells), of the frame before
    own = cells * torch.arange(frames, device=unit.device)[:, None]  # number of each frame's first cell
    parent = nearest + own
    parent[1:] = torch.where(across >= alike[1:], nearest_across + own[:-1], parent[1:])
    alike[1:] = torch.maximum(across, alike[1:])
    return torch.stack((alike, parent.float())).flatten(1)


def _order_of_leaving(alike: np.ndarray, newlines: np.ndarray) -> np.ndarray:
    """Numbers of all tokens, those that leave first in front.

    Args:
        alike: (cells,) to the cell it may join; of the first it does not count.
        newlines: boolean (visual tokens,).
    """
    turn = np.empty(len(alike))  # at which each cell leaves
    turn[1 + np.argsort(-alike[1:], kind="stable")] = np.arange(len(alike) - 1)
    turn[0] = len(alike)
    row = np.cumsum(newlines)[~newlines]  # newlines before each cell, and so the number of the one behind it
    last = np.zeros(1 + newlines.sum())  # turn of each row's last cell
    np.maximum.at(last, row, turn)
    leaving = np.empty(len(newlines))
    leaving[~newlines], leaving[newlines] = turn, np.minimum(last[:-1], len(alike) - 1) + 0.5
    return np.argsort(leaving, kind="stable")


def merge_visual(
    encoded: EncodedConversation, visual_tokens: Tensor, keep: float, config: VidLaDAConfig
) -> tuple[EncodedConversation, Tensor]:
    """A conversation with fewer visual tokens; what is left keeps its order, its frame and its place among the text.

    Args:
        encoded: as the processor encodes it.
        visual_tokens: (visual tokens, width) of all its videos and images, in order.
        keep: share of the tokens of each that is left, above 0.
        config: of the model.
    """
    if not encoded.media:
        return encoded, visual_tokens
    parts, left, first = [], np.array(encoded.frame_index) < 0, 0
    (places,) = (~left).nonzero()
    for shape in encoded.media:
        newlines = np.array(config.newlines(shape))
        frames = 1 if isinstance(shape, ImageShape) else shape
        merged, kept = merge_tokens(visual_tokens[first : first + len(newlines)], newlines, frames, keep)
        parts.append(merged)
        left[places[first + kept]] = True
        first += len(newlines)
    chosen = left.nonzero()[0].tolist()
    fewer = {name: [getattr(encoded, name)[place] for place in chosen] for name in PER_POSITION}
    return replace(encoded, **fewer), torch.cat(parts)
