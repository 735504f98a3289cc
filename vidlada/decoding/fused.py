"""Frame-wise chunk attention as one fused kernel (FlexAttention), for devices where gathering is dear.

The same result as `vidlada.decoding.attention.chunked_attention`: blocks of keys that no query of a block sees are
never read, and scores never leave the kernel. Anchors stand all over the video; to keep the blocks between them
unread, copies of their keys are appended to the sequence, and a query sees a copy only if the original is out of sight.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vidlada.decoding.attention import FrameMap

BLOCK = 128  # the kernel's blocks of queries and of keys
MAX_GRAPHS = 64  # of FlexAttention; requests of different shapes need about one for every three
BEYOND = 2**30  # more than there are frames


@cache
def compiled_flex_attention(dynamic: bool) -> Any:
    """FlexAttention, which is fused only when compiled; without that it builds all scores.

    Args:
        dynamic: once for sequences of all lengths. On a CPU PyTorch 2.13 fails at that, and compiles for every length.
    """
    # beyond the limit PyTorch would run the unfused function, which builds all scores; with `fullgraph` it raises
    compiled = torch.compile(flex_attention, dynamic=dynamic, fullgraph=True)
    return torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS)(compiled)  # others keep theirs


def can_fuse(device: torch.device) -> bool:
    """Whether the fused kernel is the better choice: it is compiled for GPUs by Triton."""
    return device.type == "cuda" and find_spec("triton") is not None


class FusedChunks:
    """Chunk attention of one request, with one block mask for all layers and steps.

    Args:
        frames: where the frames stand.
        window: neighbours on either side that a visual query sees.
        heads: of the queries.
        anchors: how many every layer has.
        attend: FlexAttention; compiled by default.
    """

    def __init__(self, frames: FrameMap, window: int, heads: int, anchors: int, attend: Any = None):
        self.frames, self.anchors = frames, anchors
        self.attend = attend or compiled_flex_attention(frames.positions.device.type != "cpu")
        of_query, of_key = frames.frame_of[frames.visual], frames.frame_of
        self.first, self.last = of_query - window, of_query + window  # (visual tokens,) frames in sight of each query
        copies = of_key.new_zeros(anchors)
        self.is_copy = torch.cat((torch.zeros_like(of_key), torch.ones_like(copies))).bool()  # (keys,)
        self.key_frames = torch.cat((of_key, copies)).repeat(heads, 1)  # (heads, keys); copies differ by layer
        partial, whole = blocks_in_sight(self.first, self.last, of_key, anchors)
        self.block_mask = BlockMask.from_kv_blocks(
            *list_blocks(partial),
            *list_blocks(whole),
            BLOCK_SIZE=BLOCK,
            mask_mod=self.sees,
            seq_lengths=(len(of_query), len(self.is_copy)),
            compute_q_blocks=False,
        )

    def sees(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether a query sees a key, as FlexAttention asks."""
        frame = self.key_frames[head, key]
        near = (frame >= self.first[query]) & (frame <= self.last[query])
        return torch.where(self.is_copy[key], ~near, near | (frame < 0))

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, anchors: Tensor | None) -> Tensor:
        """Attend.

        Args:
            queries: (heads, visual tokens, head_dim), in the order of `frames.visual`.
            keys, values: (key/value heads, tokens, head_dim) of the whole sequence.
            anchors: (anchors,) or (key/value heads, anchors) positions; None if there are none.

        Returns:
            (heads, visual tokens, head_dim).
        """
        if anchors is not None:
            anchors = anchors.expand(len(keys), -1)  # (key/value heads, anchors)
            copied = self.frames.frame_of[anchors].repeat_interleave(len(queries) // len(keys), dim=0)
            self.key_frames[:, -self.anchors :] = copied
            places = anchors[..., None].expand(-1, -1, keys.shape[-1])
            keys, values = (torch.cat((states, states.gather(1, places)), dim=1) for states in (keys, values))
        grouped = len(queries) != len(keys)
        return self.attend(queries[None], keys[None], values[None], block_mask=self.block_mask, enable_gqa=grouped)[0]


def blocks_in_sight(first: Tensor, last: Tensor, of_key: Tensor, anchors: int) -> tuple[Tensor, Tensor]:
    """Which blocks of keys a block of queries needs, and has to mask inside or sees whole.

    Args:
        first, last: (queries,) frames in sight.
        of_key: (tokens,) frame of every key, -1 for text, which all see.
        anchors: copies behind the keys.

    Returns:
        Two boolean (blocks of queries, blocks of keys) tensors that exclude each other.
    """
    text = of_key < 0
    lowest = in_blocks(of_key.masked_fill(text, BEYOND), BEYOND, anchors).amin(1)  # (blocks of keys,)
    highest = in_blocks(of_key.masked_fill(text, -BEYOND), -BEYOND, anchors).amax(1)
    has_text = in_blocks(text, False, anchors).any(1)
    ends = in_blocks(torch.ones_like(text), False, anchors).logical_not().any(1)  # copies, or nothing, in it
    has_copies = ends if anchors else torch.zeros_like(ends)
    earliest, latest_first = (
        in_blocks(first, BEYOND).amin(1)[:, None],
        in_blocks(first, -BEYOND).amax(1)[:, None],
    )
    latest, earliest_last = in_blocks(last, -BEYOND).amax(1)[:, None], in_blocks(last, BEYOND).amin(1)[:, None]
    near = (lowest <= latest) & (highest >= earliest)  # (blocks of queries, blocks of keys)
    whole = (lowest >= latest_first) & (highest <= earliest_last) & ~ends
    return (near | has_text | has_copies) & ~whole, whole


def in_blocks(values: Tensor, fill: float, anchors: int = 0) -> Tensor:
    """(tokens,) in blocks, places of anchors and of nothing filled: (blocks, block)."""
    count = len(values) + anchors
    padded = values.new_full((-(-count // BLOCK) * BLOCK,), fill)
    padded[: len(values)] = values
    return padded.view(-1, BLOCK)


def list_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the marked blocks of every row, and before them how many: what FlexAttention walks through."""
    order = blocks.logical_not().int().argsort(dim=1, stable=True)
    return blocks.sum(1).int()[None, None], order.int()[None, None]
