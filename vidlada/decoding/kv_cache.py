"""Keys, values and hidden states of one request, and the pass that recomputes a part of them.

What is special about it:
- a pass takes any positions from any layer up: a group that joins at layer l starts from the hidden states stored at
  the entry of l and stays to the top, so the active set only grows with depth;
- every active position's queries attend to the cached keys and values of all positions, its own freshly written;
- requests of different lengths share the matrix products of a pass, packed one after another without padding; only
  attention runs request by request, each against its own cache. So an answer does not depend on the other requests;
- nothing in a pass makes the host wait for a GPU, unless an attention pattern does.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidlada.model.config import VidLaDATextConfig
from vidlada.model.language_model import LanguageModel, Layer

FEW_QUERIES = 256  # up to which the keys are to be split

# Mixes one layer's values: queries (heads, active, head_dim), keys and values (key/value heads, tokens, head_dim), the
# layer's number, the active positions → (heads, active, head_dim).
Attention = Callable[[Tensor, Tensor, Tensor, int, Tensor], Tensor]


def full_attention(queries: Tensor, keys: Tensor, values: Tensor, layer: int, active: Tensor) -> Tensor:
    """Attention to all cached positions."""
    return attend_grouped(queries, keys, values)


def attend_grouped(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention over (…, heads, tokens, head_dim) where keys and values may have fewer heads."""
    grouped = queries.shape[-3] != keys.shape[-3]
    if queries.ndim == 3:  # the fused kernels know batches only; without one, the score matrix is built
        return attend_grouped(queries[None], keys[None], values[None], mask)[0]
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=grouped)


def backends(queries: int) -> list[SDPBackend]:
    """Kernels of attention on a GPU for a pass of so many positions, the preferred one first.

    Few queries leave a GPU idle unless the keys are split among its processors, as FlashAttention does. cuDNN is the
    fastest for many queries, but makes a plan for every new length. The others take masks.
    """
    few = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return few if queries <= FEW_QUERIES else [SDPBackend.CUDNN_ATTENTION, *few]


def attention_kernels(device: torch.device, queries: int) -> AbstractContextManager[None]:
    """Choose the kernels of what runs inside by its number of queries; elsewhere than on a GPU PyTorch has one."""
    return sdpa_kernel(backends(queries), set_priority=True) if device.type == "cuda" else nullcontext()


def key_value_bytes(config: VidLaDATextConfig, tokens: int, value_bytes: int) -> int:
    """Memory of the keys and values of a sequence."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens * value_bytes


class KVCache:
    """Keys, values and hidden states of one request, kept between steps.

    Args:
        config: of the language model.
        embeddings: (tokens, width) of the whole sequence; a copy is kept.
        entries: layers at which positions may join later than layer 0. Hidden states are kept at their entries.
        devices: of the layers, where a model is spread over several; the embeddings' by default.
        heads: of keys and values, where they are not all here (tensor parallelism); the model's by default.
        spare: rows of each layer after those of the sequence, for `read_with`.

    Attributes:
        tokens: of the whole sequence, those that were dropped later included.
        position_ids: of what is left once positions were dropped; None before, where they count from 0.
        layers: for each layer, on its device, (2 × key/value heads, tokens + spare, head_dim): keys, and below them
            values.
        keys, values: views of them, (key/value heads, tokens, head_dim) for each layer.
        hidden: entry layer → (tokens, width) states entering it; the number of layers → states leaving the top.
        computed: positions computed so far in each layer.
    """

    def __init__(
        self,
        config: VidLaDATextConfig,
        embeddings: Tensor,
        entries: Sequence[int] = (),
        devices: Sequence[torch.device] | None = None,
        heads: int | None = None,
        spare: int = 0,
    ):
        self.tokens, width = embeddings.shape
        self.spare = spare
        self.position_ids: Tensor | None = None
        top, self.heads = config.num_hidden_layers, heads or config.num_key_value_heads
        self.devices = list(devices or [embeddings.device] * top)
        shape = (2 * self.heads, self.tokens + spare, config.head_dim)
        self.layers = [self.allocate(embeddings, shape, device) for device in self.devices]
        self._divide(self.tokens)
        self.hidden = {0: embeddings.to(self.devices[0], copy=True)}
        for layer in sorted({*entries, top} - {0}):
            device = self.devices[min(layer, top - 1)]
            self.hidden[layer] = embeddings.new_empty(self.tokens, width, device=device)
        self.computed = [0] * top

    def allocate(self, like: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Room for the keys and values of one layer."""
        return like.new_empty(shape, device=device)

    def _divide(self, rows: int) -> None:
        self.keys = [states[: self.heads, :rows] for states in self.layers]
        self.values = [states[self.heads :, :rows] for states in self.layers]

    def write(self, layer: int, positions: Tensor, states: Tensor) -> None:
        """Put in (2 × key/value heads, positions, head_dim) keys, and below them values."""
        self.layers[layer].index_copy_(1, positions, states)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions, each (key/value heads, tokens, head_dim)."""
        return self.keys[layer], self.values[layer]

    def read_with(self, layer: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions, and after them those of further rows, which nothing else will see.

        Args:
            layer: number of the layer.
            states: (2 × key/value heads, rows, head_dim) of the further rows, at most `spare`.

        Returns:
            Two of (key/value heads, tokens + rows, head_dim).
        """
        rows, further = self.keys[layer].shape[1], states.shape[1]
        self.layers[layer][:, rows : rows + further].copy_(states)
        keys, values = self.layers[layer][:, : rows + further].split(self.heads)
        return keys, values

    def select(self, layer: int, positions: Tensor) -> Tensor:
        """Keys, and below them values, of some positions."""
        return self.layers[layer].index_select(1, positions)

    def rotary_positions(self, places: Tensor) -> Tensor:
        """Position ids of rows of this cache."""
        return places if self.position_ids is None else self.position_ids.to(places.device).index_select(0, places)

    def keep(self, places: Tensor) -> None:
        """Drop all rows but those at the ascending `places`; what is left keeps its position ids."""
        self.position_ids = self.rotary_positions(places)
        self.keys, self.values = [], []
        rows = torch.cat((places, places[:1].expand(self.spare)))
        for number, states in enumerate(self.layers):  # layer by layer, so that no two copies of all lie in memory
            self.layers[number] = states.index_select(1, rows.to(states.device))
        self._divide(len(places))
        for layer, states in self.hidden.items():
            self.hidden[layer] = states.index_select(0, places.to(states.device))

    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(states.nbytes for states in (*self.layers, *self.hidden.values()))


@dataclass(frozen=True)
class PartialPass:
    """One request's share of a pass.

    Attributes:
        kv_cache: read, and updated at the recomputed positions.
        joins: layer → positions that are recomputed from that layer to the top.
        attention: what the queries attend to.
        narrow: after the first layer only so many positions go on, those whose values there changed most since they
            were last computed; None for all.
        answer: ids of the answer as it stands, whose embeddings are to enter the first layer, and their positions.
        compact: layer → keys, and below them values, that the queries attend to instead of the whole cache: first
            those of the pass's own positions, which are written here alone.
        wanted: so many of the positions, those that are active first, whose states leave the last layer; None for all.
            There the others leave keys and values only.
        store_states: keep the states that enter those layers where positions may join.
    """

    kv_cache: KVCache
    joins: Mapping[int, Tensor]
    attention: Attention = field(default=full_attention)
    narrow: int | None = None
    answer: tuple[Tensor, slice] | None = None
    compact: Mapping[int, Tensor] = field(default_factory=dict)
    wanted: int | None = None
    store_states: bool = True


@torch.inference_mode()
def refresh(language_model: LanguageModel, passes: Sequence[PartialPass]) -> None:
    """Recompute the positions of every request's `joins`, and write the results into its KV cache.

    Args:
        language_model: whose layers run.
        passes: one a request; each is computed as if it were alone.
    """
    queries = [sum(map(len, each.joins.values())) for each in passes]
    mixed = min(queries) <= FEW_QUERIES < max(queries)
    with attention_kernels(passes[0].kv_cache.hidden[0].device, min(queries)):
        _refresh(language_model, passes, mixed)


def _refresh(language_model: LanguageModel, passes: Sequence[PartialPass], mixed: bool) -> None:
    caches = [each.kv_cache for each in passes]
    devices, longest = caches[0].devices, max(kv_cache.tokens for kv_cache in caches)
    for each in passes:
        if each.answer is not None:
            ids, slots = each.answer
            each.kv_cache.hidden[0][slots] = language_model.embed_tokens(ids)
    active = [kv_cache.hidden[0].new_empty(0, dtype=torch.long) for kv_cache in caches]
    hidden = caches[0].hidden[0][:0]  # (active positions of all requests, width)
    rotation, changed, asking = hidden, list[Tensor](), [0] * len(passes)
    for number, layer in enumerate(language_model.layers):
        moved = hidden.device != devices[number]
        if moved:
            hidden, active = hidden.to(devices[number]), [positions.to(devices[number]) for positions in active]
        narrowed = number == 1 and any(each.narrow is not None for each in passes)
        if narrowed:
            hidden = _narrow(passes, active, hidden, changed)
        if number == 0 or any(number in kv_cache.hidden for kv_cache in caches):
            hidden = _join(passes, active, hidden, number)
        if not len(hidden):
            continue
        if moved or narrowed or number == 0 or any(number in each.joins for each in passes):
            table = language_model.rotation(longest, hidden.dtype, hidden.device)
            places = [each.kv_cache.rotary_positions(own) for each, own in zip(passes, active, strict=True)]
            rotation = table.index_select(1, concatenate(places))
        assert isinstance(layer, Layer)
        sizes = asking = [len(positions) for positions in active]
        if number == len(devices) - 1:
            asking = [
                size if each.wanted is None else min(size, each.wanted)
                for each, size in zip(passes, sizes, strict=True)
            ]
        if asking == sizes:
            queries, keys_values = language_model.enter(layer, hidden, rotation)
        else:
            starts = accumulate(sizes[:-1], initial=0)
            rows = [slice(start, start + count) for start, count in zip(starts, asking, strict=True)]
            hidden, queries, keys_values = layer.enter_last(hidden, rotation, rows)
        parts = list(zip(passes, active, queries.split(asking, 1), keys_values.split(sizes, 1), strict=True))
        if number == 0:
            changed = [_changes(each, positions, fresh) for each, positions, _, fresh in parts]
        hidden = language_model.leave(
            layer, hidden, concatenate([_attend(part[0], number, *part[1:], mixed) for part in parts])
        )
    normed = language_model.norm(hidden).split(asking)
    for kv_cache, positions, states in zip(caches, active, normed, strict=True):
        kv_cache.hidden[len(devices)].index_copy_(0, positions[: len(states)], states)


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Along the first dimension, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _join(passes: Sequence[PartialPass], active: list[Tensor], hidden: Tensor, number: int) -> Tensor:
    """Keep the states that enter a layer, and add those of the positions that join there."""
    parts, before = [], sum(map(len, active))
    for place, (each, states) in enumerate(zip(passes, hidden.split([len(a) for a in active]), strict=True)):
        entering = each.kv_cache.hidden.get(number)
        if entering is not None and each.store_states and len(states):
            entering.index_copy_(0, active[place], states)
        joining = each.joins.get(number)
        if joining is not None and len(joining):
            assert entering is not None, f"no hidden states are stored at layer {number}"
            joining, joined = joining.to(entering.device), entering.index_select(0, joining.to(entering.device))
            active[place] = torch.cat((active[place], joining)) if len(states) else joining
            states = torch.cat((states, joined)) if len(states) else joined
        parts.append(states)
    return hidden if sum(map(len, parts)) == before else concatenate(parts)


def _changes(each: PartialPass, active: Tensor, keys_values: Tensor) -> Tensor:
    """How far the first layer's fresh values of each active position are from the stored ones, as 1 - cosine."""
    if each.narrow is None:
        return keys_values.new_empty(0)
    stored = each.kv_cache.read(0)[1].index_select(1, active)
    return 1 - cosine(keys_values[len(stored) :], stored, (-3, -1))


def cosine(first: Tensor, second: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Cosine similarity along some dimensions, counted from the last, in float32: in bfloat16 what hardly changed would
    tie. In half as many kernels as `F.cosine_similarity`."""
    pair = torch.stack((first, second)).float()
    lengths = torch.linalg.vector_norm(pair, dim=dim)
    return (pair[0] * pair[1]).sum(dim) / (lengths[0] * lengths[1]).clamp_min_(torch.finfo(torch.float32).tiny)


def _narrow(passes: Sequence[PartialPass], active: list[Tensor], hidden: Tensor, changed: list[Tensor]) -> Tensor:
    """Let only the positions that changed most go on."""
    parts = []
    for place, (each, states) in enumerate(zip(passes, hidden.split([len(a) for a in active]), strict=True)):
        if each.narrow is not None and each.narrow < len(states):
            most = changed[place].to(states.device).topk(each.narrow).indices.sort().values
            active[place], states = active[place].index_select(0, most), states.index_select(0, most)
        parts.append(states)
    return concatenate(parts)


def _attend(each: PartialPass, layer: int, active: Tensor, queries: Tensor, keys_values: Tensor, mixed: bool) -> Tensor:
    """Write one request's fresh keys and values, then let its queries look, in the last layer those of the first
    positions only: (queries, heads × head_dim). In a pass of requests with few and with many queries, each has kernels
    of its own."""
    kv_cache, compact = each.kv_cache, each.compact.get(layer)
    kv_cache.computed[layer] += len(active)
    if compact is None:
        kv_cache.write(layer, active, keys_values)
        keys, values = kv_cache.read(layer)
    else:
        compact[:, : len(active)].copy_(keys_values)
        keys, values = compact.chunk(2)
    # patterns remember what they found out about a set of positions, by the tensor
    asking = active if queries.shape[1] == len(active) else active[: queries.shape[1]]
    with attention_kernels(queries.device, queries.shape[1]) if mixed else nullcontext():
        seen = each.attention(queries, keys, values, layer, asking)
    return seen.transpose(0, 1).flatten(1)
