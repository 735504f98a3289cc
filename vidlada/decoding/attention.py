"""Frame-wise chunk attention and the search for anchors (MARS-Cache, parts 4 and 5).

A visual query sees the frames around its own, the anchors and all text; text and response queries see everything.
No (visual tokens × visual tokens) matrix is built: each frame's keys are gathered into a block of their own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vidlada.decoding.kv_cache import attend_grouped


@dataclass(frozen=True)
class FrameMap:
    """Which positions belong to which frame.

    Attributes:
        positions: (frames, most tokens of a frame) positions, filled up with the frame's first.
        valid: boolean, same shape: False at the filling.
        others: positions that are no visual token.
        frame_of: (tokens,) frame of each position, -1 for the others.
    """

    positions: Tensor
    valid: Tensor
    others: Tensor
    frame_of: Tensor

    @classmethod
    def from_frame_index(cls, frame_index: Tensor) -> "FrameMap":
        """From the frame of each position, -1 where it is none. Frames may differ in size."""
        frames = [(frame_index == number).nonzero()[:, 0] for number in frame_index[frame_index >= 0].unique().tolist()]
        most = max((len(frame) for frame in frames), default=0)
        positions = frame_index.new_zeros(len(frames), most)
        valid = torch.zeros_like(positions, dtype=torch.bool)
        frame_of = torch.full_like(frame_index, -1)
        for number, frame in enumerate(frames):
            positions[number] = frame[0]
            positions[number, : len(frame)] = frame
            valid[number, : len(frame)] = True
            frame_of[frame] = number
        return cls(positions, valid, (frame_index < 0).nonzero()[:, 0], frame_of)

    @property
    def visual(self) -> Tensor:
        """All visual positions, frame after frame."""
        return self.positions[self.valid]

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
    block_queries[:, frames.valid] = queries
    groups = len(queries) // len(keys)
    mixed = attend_grouped(
        block_queries.transpose(0, 1),  # (frames, heads, tokens of a frame, head_dim)
        block_keys.transpose(0, 1),
        block_values.transpose(0, 1),
        mask.transpose(0, 1).repeat_interleave(groups, dim=1)[:, :, None],
    )
    return mixed.transpose(0, 1)[:, frames.valid]


def scenes_of(frame_embeddings: Tensor, sizes: Tensor, threshold: float) -> tuple[Tensor, ...]:
    """Cut a video where its frames change abruptly.

    Args:
        frame_embeddings: (frames, width) mean of every frame's tokens.
        sizes: (frames,) visual tokens of every frame.
        threshold: a scene begins where 1 - cosine to the frame before is above it; 0 leaves the video whole.

    Returns:
        Numbers of the visual tokens of every scene.
    """
    numbers = torch.arange(int(sizes.sum()), device=sizes.device)
    if threshold == 0:
        return (numbers,)
    similarity = F.cosine_similarity(frame_embeddings[1:].float(), frame_embeddings[:-1].float(), dim=-1)
    cuts = (1 - similarity > threshold).nonzero()[:, 0] + 1
    return numbers.tensor_split(sizes.cumsum(0)[cuts - 1].cpu())


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
