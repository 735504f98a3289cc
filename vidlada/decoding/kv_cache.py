"""Keys, values and hidden states of one request, and the pass that recomputes a part of them.

What is special about it:
- a pass takes any positions from any layer up: a group that joins at layer l starts from the hidden states stored at
  the entry of l and stays to the top, so the active set only grows with depth;
- every active position's queries attend to the cached keys and values of all positions, its own freshly written;
- requests of different lengths share the matrix products of a pass, packed one after another without padding; only
  attention runs request by request, each against its own cache. So an answer does not depend on the other requests.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vidlada.model.config import VidLaDATextConfig
from vidlada.model.language_model import LanguageModel, Layer, Rotation, rotary_angles

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


def key_value_bytes(config: VidLaDATextConfig, tokens: int, value_bytes: int) -> int:
    """Memory of the keys and values of a sequence."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens * value_bytes


class KVCache:
    """Keys, values and hidden states of one request, kept between steps.

    Args:
        config: of the language model.
        embeddings: (tokens, width) of the whole sequence; a copy is kept.
        entries: layers at which positions may join later than layer 0. Hidden states are kept at their entries.

    Attributes:
        keys, values: (layers, key/value heads, tokens, head_dim).
        hidden: entry layer → (tokens, width) states entering it; the number of layers → states leaving the top.
        computed: positions computed so far in each layer.
    """

    def __init__(self, config: VidLaDATextConfig, embeddings: Tensor, entries: Sequence[int] = ()):
        tokens, width = embeddings.shape
        shape = (config.num_hidden_layers, config.num_key_value_heads, tokens, config.head_dim)
        self.keys, self.values = embeddings.new_empty(shape), embeddings.new_empty(shape)
        kept = sorted({*entries, config.num_hidden_layers} - {0})
        self.hidden = {0: embeddings.clone()} | {layer: embeddings.new_empty(tokens, width) for layer in kept}
        self.computed = [0] * config.num_hidden_layers

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.keys.shape[2]

    def nbytes(self) -> int:
        """Memory it takes."""
        return self.keys.nbytes + self.values.nbytes + sum(states.nbytes for states in self.hidden.values())


@dataclass(frozen=True)
class PartialPass:
    """One request's share of a pass.

    Attributes:
        kv_cache: read, and updated at the recomputed positions.
        joins: layer → positions that are recomputed from that layer to the top.
        attention: what the queries attend to.
        narrow: after the first layer only so many positions go on, those whose values there changed most since they
            were last computed; None for all.
    """

    kv_cache: KVCache
    joins: Mapping[int, Tensor]
    attention: Attention = field(default=full_attention)
    narrow: int | None = None


@torch.inference_mode()
def refresh(language_model: LanguageModel, passes: Sequence[PartialPass]) -> None:
    """Recompute the positions of every request's `joins`, and write the results into its KV cache.

    Args:
        language_model: whose layers run.
        passes: one a request; each is computed as if it were alone.
    """
    config = language_model.config
    active = [each.kv_cache.hidden[0].new_empty(0, dtype=torch.long) for each in passes]
    hidden = passes[0].kv_cache.hidden[0][:0]  # (active positions of all requests, width)
    rotation: Rotation | None = None
    changed: list[Tensor] = []
    for number, layer in enumerate(language_model.layers):
        if number == 1 and any(each.narrow is not None for each in passes):
            hidden = _narrow(passes, active, hidden, changed)
        if number <= 1 or any(number in each.kv_cache.hidden for each in passes):
            hidden = _join(passes, active, hidden, number)
            positions = torch.cat(active)
            rotation = rotary_angles(positions[None], config.head_dim, config.rope_theta, hidden.dtype)
        if not len(hidden):
            continue
        assert rotation is not None
        assert isinstance(layer, Layer)
        sizes = [len(positions) for positions in active]
        projected = language_model.enter(layer, hidden[None], rotation)
        queries, keys, values = ([*states[0].split(sizes, dim=1)] for states in projected)
        if number == 0:
            changed = [_changes(*parts) for parts in zip(passes, active, values, strict=True)]
        mixed = [
            _attend(each, number, *parts) for each, *parts in zip(passes, active, queries, keys, values, strict=True)
        ]
        hidden = language_model.leave(layer, hidden, torch.cat(mixed))
    for each, positions, states in zip(passes, active, hidden.split([len(a) for a in active]), strict=True):
        each.kv_cache.hidden[config.num_hidden_layers].index_copy_(0, positions, language_model.norm(states))


def _join(passes: Sequence[PartialPass], active: list[Tensor], hidden: Tensor, number: int) -> Tensor:
    """KVCache the states that enter a layer, and add those of the positions that join there."""
    parts = []
    for place, (each, states) in enumerate(zip(passes, hidden.split([len(a) for a in active]), strict=True)):
        entering = each.kv_cache.hidden.get(number)
        if entering is not None and len(states):
            entering.index_copy_(0, active[place], states)
        joining = each.joins.get(number)
        if joining is not None and len(joining):
            assert entering is not None, f"no hidden states are stored at layer {number}"
            active[place] = torch.cat((active[place], joining))
            states = torch.cat((states, entering.index_select(0, joining)))
        parts.append(states)
    return torch.cat(parts)


def _changes(each: PartialPass, active: Tensor, values: Tensor) -> Tensor:
    """How far the first layer's fresh values of each active position are from the stored ones, as 1 - cosine."""
    if each.narrow is None:
        return values.new_empty(0)
    stored = each.kv_cache.values[0][:, active]
    similarity = F.cosine_similarity(values.transpose(0, 1).flatten(1), stored.transpose(0, 1).flatten(1), dim=-1)
    return 1 - similarity


def _narrow(passes: Sequence[PartialPass], active: list[Tensor], hidden: Tensor, changed: list[Tensor]) -> Tensor:
    """Let only the positions that changed most go on."""
    parts = []
    for place, (each, states) in enumerate(zip(passes, hidden.split([len(a) for a in active]), strict=True)):
        if each.narrow is not None and each.narrow < len(states):
            most = changed[place].topk(each.narrow).indices.sort().values
            active[place], states = active[place][most], states[most]
        parts.append(states)
    return torch.cat(parts)


def _attend(each: PartialPass, layer: int, active: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Write one request's fresh keys and values, then let its queries look: (active, heads × head_dim)."""
    kv_cache = each.kv_cache
    kv_cache.keys[layer].index_copy_(1, active, keys)
    kv_cache.values[layer].index_copy_(1, active, values)
    kv_cache.computed[layer] += len(active)
    return (
        each.attention(queries, kv_cache.keys[layer], kv_cache.values[layer], layer, active).transpose(0, 1).flatten(1)
    )
