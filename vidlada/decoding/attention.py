"""Frame-wise chunk attention and the search for anchors (MARS-Cache, parts 4 and 5).

A visual query sees the frames around its own, the anchors and all text; text and response queries see everything.
No (visual tokens × visual tokens) matrix is built: each frame's keys are gathered into a block of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vidlada.decoding.kv_cache import attend_grouped, cosine


def upload(arrays: dict[str, np.ndarray], device: torch.device | str) -> dict[str, Tensor]:
    """Arrays of whole numbers onto a device, in one copy that the host does not wait for."""
    sizes = [array.size for array in arrays.values()]
    host = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays.values()]).astype(np.int64))
    if torch.device(device).type != "cpu":
        host = host.pin_memory()
    parts = host.to(device, non_blocking=True).split(sizes)
    return {name: part.view(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)}


@dataclass(frozen=True)
class FrameMap:
    """Which positions belong to which frame.

    Attributes:
        positions: (frames, most tokens of a frame) positions, filled up with the frame's first.
        valid: boolean, same shape: False at the filling.
        visual: all visual positions, frame after frame.
        places: of the valid positions among all, (visual tokens,).
        others: positions that are no visual token.
        frame_of: (tokens,) frame of each position, -1 for the others.
        sizes: tokens of each frame.
    """

    positions: Tensor
    valid: Tensor
    visual: Tensor
    places: Tensor
    others: Tensor
    frame_of: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def from_frame_index(
        cls, frame_index: Tensor | Sequence[int] | np.ndarray, device: torch.device | str = "cpu"
    ) -> "FrameMap":
        """From the frame of each position, -1 where it is none. Frames may differ in size.

        Args:
            frame_index: (tokens,), on the host.
            device: of the result.
        """
        index = np.asarray(frame_index, dtype=np.int64)
        is_visual = index >= 0
        (others,), (found,) = (~is_visual).nonzero(), is_visual.nonzero()
        visual = found[np.argsort(index[found], kind="stable")]
        _, number, sizes = np.unique(index[visual], return_inverse=True, return_counts=True)
        starts = np.cumsum(sizes) - sizes
        frame_of = np.full_like(index, -1)
        frame_of[visual] = number
        most = int(sizes.max(initial=0))
        column = np.arange(most)[None]
        valid = column < sizes[:, None]  # (frames, most)
        positions = (
            visual[np.where(valid, starts[:, None] + column, starts[:, None])] if most else valid.astype(np.int64)
        )
        arrays = {"positions": positions, "valid": valid, "visual": visual, "others": others, "frame_of": frame_of,
                  "places": valid.reshape(-1).nonzero()[0]}  # fmt: skip
        tensors = upload(arrays, device)
        return cls(**{**tensors, "valid": tensors["valid"].bool()}, sizes=tuple(sizes.tolist()))

    def neighbours(self, window: int) -> tuple[Tensor, Tensor]:
        """Positions of each frame's neighbourhood and which of them count.

        Returns:
            Two (frames, (2 window + 1) × most tokens) tensors.
        """
        frames = torch.arange(len(self.positions), device=self.positions.device)
        near = frames[:, None] + torch.arange(-window, window + 1, device=frames.device)  # (frames, 2 window + 1)
        inside = (near >= 0) & (near < len(frames))
        near = near.clamp(0, len(frames) - 1)
        return self.positions[near].flatten(1), (self.valid[near] & inside[..., None]).flatten(1)


def chunked_attention(
    queries: Tensor, keys: Tensor, values: Tensor, frames: FrameMap, window: int, anchors: Tensor | None = None
) -> Tensor:
    """Attention of all visual queries to the frames around their own, the anchors, and everything that is no frame.

    Args:
        queries: (heads, visual tokens, head_dim), in the order of `frames.visual`.
        keys, values: (key/value heads, tokens, head_dim) of the whole sequence.
        frames: where the frames stand.
        window: neighbours on either side.
        anchors: (anchors,) positions, or (key/value heads, anchors); None for none.

    Returns:
        (heads, visual tokens, head_dim).
    """
    count, most = frames.positions.shape
    near, near_valid = frames.neighbours(window)
    index = torch.cat((near, frames.others.expand(count, -1)), dim=1)  # (frames, keys)
    valid = torch.cat((near_valid, near_valid.new_ones(count, len(frames.others))), dim=1)
    block_keys, block_values = keys[:, index], values[:, index]  # (key/value heads, frames, keys, head_dim)
    mask = valid.expand(len(keys), -1, -1)  # (key/value heads, frames, keys)
    if anchors is not None:
        anchors = anchors.expand(len(keys), -1)  # (key/value heads, anchors)
        places = anchors[..., None].expand(-1, -1, keys.shape[-1])
        gathered = (states.gather(1, places)[:, None].expand(-1, count, -1, -1) for states in (keys, values))
        extra_keys, extra_values = gathered
        block_keys, block_values = torch.cat((block_keys, extra_keys), 2), torch.cat((block_values, extra_values), 2)
        # an anchor in a neighbouring frame is seen already
        distance = (frames.frame_of[anchors][:, None] - torch.arange(count, device=anchors.device)[:, None]).abs()
        mask = torch.cat((mask, distance > window), dim=2)
    block_queries = queries.new_zeros(len(queries), count, most, queries.shape[-1])
    block_queries.flatten(1, 2).index_copy_(1, frames.places, queries)
    groups = len(queries) // len(keys)
    mixed = attend_grouped(
        block_queries.transpose(0, 1),  # (frames, heads, tokens of a frame, head_dim)
        block_keys.transpose(0, 1),
        block_values.transpose(0, 1),
        mask.transpose(0, 1).repeat_interleave(groups, dim=1)[:, :, None],
    )
    return mixed.transpose(0, 1).flatten(1, 2).index_select(1, frames.places)


def scenes_of(frame_embeddings: Tensor, sizes: Sequence[int], threshold: float) -> tuple[Tensor, ...]:
    """Cut a video where its frames change abruptly.

    Args:
        frame_embeddings: (frames, width) mean of every frame's tokens.
        sizes: visual tokens of every frame.
        threshold: a scene begins where 1 - cosine to the frame before is above it; 0 leaves the video whole.

    Returns:
        Numbers of the visual tokens of every scene.
    """
    numbers = torch.arange(sum(sizes), device=frame_embeddings.device)
    if threshold == 0:
        return (numbers,)
    similarity = cosine(frame_embeddings[1:], frame_embeddings[:-1], -1)
    ends = np.cumsum(sizes)[:-1]
    return numbers.tensor_split(ends[(1 - similarity > threshold).cpu().numpy()].tolist())


def find_anchors(queries: Tensor, keys: Tensor, count: int, per_head: bool = False) -> Tensor:
    """The visual tokens that sampled visual queries attend to most.

    Args:
        queries: (heads, sampled, head_dim), rotated.
        keys: (key/value heads, visual tokens, head_dim), rotated.
        count: anchors to keep.
        per_head: choose for each key/value head instead of once for the layer.

    Returns:
        (count,) or (key/value heads, count) numbers of visual tokens, ascending.
    """
    groups = len(queries) // len(keys)
    scale = queries.shape[-1] ** -0.5
    scores = queries.unflatten(0, (-1, groups)).float() @ keys[:, None].float().transpose(-1, -2) * scale
    received = scores.softmax(-1).sum((1, 2))  # (key/value heads, visual tokens)
    if not per_head:
        received = received.sum(0)
    return received.topk(count, dim=-1).indices.sort(-1).values
