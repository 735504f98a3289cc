"""The bidirectional transformer: Llama's layers without a causal mask (LLaDA).

What is special about it:
- every position attends to every position that is not padding;
- norms and rotary angles are computed in float32 whatever the weights' type; the frequencies are never a buffer,
  so casting the module cannot round them (at position 13,000 a bfloat16 frequency is off by whole turns);
- no (tokens, tokens) mask is built unless a caller brings one: padding is a mask over keys only;
- for decoding, projections of the same input may be packed into one product each (`LanguageModel.pack`).
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vidlada.model.config import VidLaDATextConfig
from vidlada.model.masks import AnyMask, attend
from vidlada.model.rotary import Rotation, rotary_angles, rotate, rotate_, rotation_table


def copy_on_cpu(states: Tensor) -> Tensor:
    """One head's states after another's in memory: on a CPU a copy costs less than attention to strided ones."""
    return states.contiguous() if states.device.type == "cpu" else states


def is_plain(linear: nn.Module) -> bool:
    """Whether a layer's weight is one tensor: those that are smaller, or lie on several devices, are tensors of
    tensors, by their type (torch.compile does not see attributes of the weight itself)."""
    return type(linear) is nn.Linear and not hasattr(type(linear.weight), "__tensor_flatten__")


def add_product(residual: Tensor, linear: nn.Module, states: Tensor) -> Tensor:
    """`residual + linear(states)`: one kernel where gradients, autocast, adapters and smaller weights do not forbid it.

    Args:
        residual: (tokens, out) or (batch, tokens, out).
        linear: without a bias.
        states: (tokens, in) or (batch, tokens, in).
    """
    plain = is_plain(linear) and residual.ndim == 2
    if not plain or torch.is_grad_enabled() or torch.is_autocast_enabled(residual.device.type):
        return residual + linear(states)
    return torch.addmm(residual, states, cast(Tensor, linear.weight).t())


def pack(module: nn.Module, packed: str, names: Sequence[str]) -> bool:
    """Replace linear layers of the same input by one, in place. State dicts keep the names of the parts.

    Args:
        module: that holds them.
        packed: name of the new layer.
        names: of the layers it replaces, none with a bias.

    Returns:
        Whether it was done; not where their weights are kept elsewhere for lack of memory.
    """
    parts = [cast(nn.Linear, module.get_submodule(name)) for name in names]
    if any(part.weight.is_meta and hasattr(part, "_hf_hook") for part in parts):  # accelerate's, which fetches them
        return False
    weights = [part.weight for part in parts]
    sizes = [len(weight) for weight in weights]
    whole = nn.Linear(weights[0].shape[1], sum(sizes), bias=False, device="meta")
    whole.weight = nn.Parameter(torch.cat([weight.detach() for weight in weights]), requires_grad=False)
    for name in names:
        delattr(module, name)
    setattr(module, packed, whole)

    def split(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, metadata: object) -> None:
        parts = state_dict.pop(f"{prefix}{packed}.weight").split(sizes)
        state_dict.update({f"{prefix}{name}.weight": part for name, part in zip(names, parts, strict=True)})

    def join(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        keys = [f"{prefix}{name}.weight" for name in names]
        if all(key in state_dict for key in keys):
            state_dict[f"{prefix}{packed}.weight"] = torch.cat([state_dict.pop(key) for key in keys])

    module.register_state_dict_post_hook(split)
    module.register_load_state_dict_pre_hook(join)
    return True


# Of a CPU's pass that go through an MLP at once: what lies between its products stays near the processor, and small
# enough for the C library to keep the memory, whose pages are zeroed whenever the system gives them
CPU_ROWS = 1024


class RMSNorm(nn.Module):
    """Root-mean-square norm: float32 inside, whatever the type of the states."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.dtype == self.weight.dtype:  # one kernel on a GPU, rounded once instead of twice
            return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)
        return self.weight * F.rms_norm(hidden.float(), (hidden.shape[-1],), eps=self.eps).to(hidden.dtype)


class Attention(nn.Module):
    """Multi-head attention over all positions, with grouped key/value heads where the configuration has fewer."""

    def __init__(self, config: VidLaDATextConfig):
        super().__init__()
        self.head_dim, self.packed = config.head_dim, False
        self.heads_of = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.groups = config.num_attention_heads // config.num_key_value_heads
        key_value_width = config.num_key_value_heads * config.head_dim
        self.qkv_proj: nn.Linear  # once packed
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def heads(self, states: Tensor) -> Tensor:
        """(batch, tokens, width) → (batch, heads, tokens, head_dim)."""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def project(self, hidden: Tensor, rotation: Rotation, wanted: slice | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (batch, heads, tokens, head_dim), of `wanted` tokens only, and keys and values with the key/value
        heads; rotated."""
        if wanted is not None:
            asking, states = self.products(hidden[:, wanted], hidden)
            keys, values = copy_on_cpu(self.heads(states)).chunk(2, dim=1)
            asking_rotation = rotation[0][:, :, wanted], rotation[1][:, :, wanted]
            return rotate(self.heads(asking), asking_rotation), rotate(keys, rotation), values
        if self.packed:
            states = copy_on_cpu(self.heads(self.qkv_proj(hidden)))
            queries, keys, values = states.split(self.heads_of, dim=1)
        else:
            queries, keys, values = (self.heads(part(hidden)) for part in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(queries, rotation), rotate(keys, rotation), values

    def project_rows(self, hidden: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """The same without gradients, for a KV cache that keeps keys and values in one tensor.

        Args:
            hidden: (tokens, width).
            rotation: (2, tokens, head_dim) rows of `rotation_table`.

        Returns:
            Queries (heads, tokens, head_dim); keys and below them values, (2 × key/value heads, tokens, head_dim).
        """
        if self.packed:
            states = self.qkv_proj(hidden)
        else:
            states = torch.cat([part(hidden) for part in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        states = states.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)  # (heads of all three, tokens, head_dim)
        states = copy_on_cpu(states)
        queries, keys, _ = self.heads_of
        rotate_(states[: queries + keys], rotation)
        return states[:queries], states[queries:]

    def products(self, asking: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of some rows; keys, and beside them values, of all: (…, rows, width of each)."""
        if not self.packed:
            return self.q_proj(asking), torch.cat((self.k_proj(hidden), self.v_proj(hidden)), dim=-1)
        width = self.heads_of[0] * self.head_dim
        if is_plain(self.qkv_proj):
            return F.linear(asking, self.qkv_proj.weight[:width]), F.linear(hidden, self.qkv_proj.weight[width:])
        return self.qkv_proj(asking)[..., :width], self.qkv_proj(hidden)[..., width:]

    def project_last(
        self, asking: Tensor, asking_rotation: Tensor, hidden: Tensor, rotation: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Like `project_rows`, with the queries of some rows only."""
        heads = (states.unflatten(-1, (-1, self.head_dim)) for states in self.products(asking, hidden))
        queries, keys_values = (states.transpose(0, 1).contiguous() for states in heads)
        rotate_(queries, asking_rotation)
        rotate_(keys_values[: self.heads_of[1]], rotation)
        return queries, keys_values

    def pack(self) -> None:
        """One product instead of three."""
        self.packed = pack(self, "qkv_proj", ("q_proj", "k_proj", "v_proj"))

    def mix(self, queries: Tensor, keys: Tensor, values: Tensor, attention_mask: AnyMask) -> Tensor:
        """What every position sees of the others: (batch, tokens, width)."""
        if self.groups > 1:
            keys, values = (states.repeat_interleave(self.groups, dim=1) for states in (keys, values))
        return attend(queries, keys, values, attention_mask).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: VidLaDATextConfig):
        super().__init__()
        self.packed = False
        self.gate_up_proj: nn.Linear  # once packed
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def gate(self, hidden: Tensor) -> Tensor:
        """The states between the two products."""
        if self.packed:
            gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        return F.silu(gate) * up

    def pack(self) -> None:
        """One product instead of two."""
        self.packed = pack(self, "gate_up_proj", ("gate_proj", "up_proj"))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.gate(hidden))


class Layer(GradientCheckpointingLayer):
    """One pre-norm block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: VidLaDATextConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def pack(self) -> None:
        """Two products instead of five. Harmless where it is done already."""
        for part in (self.self_attn, self.mlp):
            if not part.packed:
                part.pack()

    def compile_parts(self) -> None:
        """Let torch.compile fuse all but attention, once for all layers and any number of tokens."""
        self.enter = torch.compile(self.enter, dynamic=True)  # type: ignore[method-assign]
        self.leave = torch.compile(self.leave, dynamic=True)  # type: ignore[method-assign]

    def enter(self, hidden: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """All before positions meet: queries, keys and values of (batch, tokens, width) states."""
        return self.self_attn.project(self.input_layernorm(hidden), rotation)

    def enter_rows(self, hidden: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """All of a cached pass before positions meet; see `Attention.project_rows`."""
        return self.self_attn.project_rows(self.input_layernorm(hidden), rotation)

    def enter_last(self, hidden: Tensor, rotation: Tensor, wanted: Sequence[slice]) -> tuple[Tensor, Tensor, Tensor]:
        """Like `enter_rows`, for the last layer: only wanted rows go on, all leave their keys and values.

        Args:
            hidden: (tokens, width).
            rotation: (2, tokens, head_dim) rows of `rotation_table`.
            wanted: rows.

        Returns:
            The wanted rows' states, their queries, and all rows' keys and values.
        """
        normed = self.input_layernorm(hidden)
        asking, left = (torch.cat([states[rows] for rows in wanted]) for states in (normed, hidden))
        asking_rotation = torch.cat([rotation[:, rows] for rows in wanted], dim=1)
        return left, *self.self_attn.project_last(asking, asking_rotation, normed, rotation)

    def leave(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """All after: what was seen, (…, tokens, width), goes into the residual stream."""
        if (
            hidden.shape[-2] > CPU_ROWS
            and hidden.device.type == "cpu"
            and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        ):
            parts = zip(hidden.split(CPU_ROWS, dim=-2), mixed.split(CPU_ROWS, dim=-2), strict=True)
            return torch.cat([self.leave(*part) for part in parts], dim=-2)
        hidden = add_product(hidden, self.self_attn.o_proj, mixed)
        return add_product(hidden, self.mlp.down_proj, self.mlp.gate(self.post_attention_layernorm(hidden)))

    def forward(
        self, hidden: Tensor, rotation: Rotation, attention_mask: AnyMask, wanted: slice | None = None
    ) -> Tensor:
        if wanted is None:
            return self.leave(hidden, self.self_attn.mix(*self.enter(hidden, rotation), attention_mask))
        states = self.self_attn.project(self.input_layernorm(hidden), rotation, wanted)
        return self.leave(hidden[:, wanted], self.self_attn.mix(*states, attention_mask))


class LanguageModel(nn.Module):
    """Token embeddings, layers and final norm.

    Args:
        config: the language model's configuration.
    """

    def __init__(self, config: VidLaDATextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.enter, self.leave = Layer.enter_rows, Layer.leave  # what a cached pass runs of every layer
        self.static: bool | None = None  # whether decoding replays repeated passes; None: on a GPU
        self.tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def pack(self) -> None:
        """Let every layer run two products where it has five, for decoding. Harmless where it is done already."""
        for layer in self.layers:
            layer.pack()  # type: ignore[operator]

    def rotation(self, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`rotation_table` of at least `tokens` positions, made once for all requests."""
        table = self.tables.get((dtype, device))
        if table is None or table.shape[1] < tokens:
            config = self.config
            table = rotation_table(tokens, config.head_dim, config.rope_theta, dtype, device)
            self.tables[dtype, device] = table
        return table

    @property
    def key_value_heads(self) -> int:
        """Of a layer in this process; fewer than the configuration's where they are divided among several."""
        return self.layers[0].self_attn.heads_of[1]  # type: ignore[union-attr, index, return-value]

    @property
    def processes(self) -> int:
        """That every layer is divided among (`vidlada.model.parallel`); 1 where it is whole."""
        return self.config.num_key_value_heads // self.key_value_heads

    @property
    def devices(self) -> list[torch.device]:
        """Of the layers; more than one where the model is spread over several."""
        return [layer.input_layernorm.weight.device for layer in self.layers]  # type: ignore[union-attr, misc]

    def compile_layers(self) -> None:
        """Let torch.compile fuse what a cached pass runs of every layer, once for all layers and any number of tokens.

        The first passes then take seconds longer. Full passes without a cache run compiled parts too.
        """
        for layer in self.layers:
            layer.compile_parts()  # type: ignore[operator]
        self.enter = torch.compile(Layer.enter_rows, dynamic=True)
        self.leave = torch.compile(Layer.leave, dynamic=True)

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: AnyMask = None,
        wanted: slice | None = None,
    ) -> Tensor:
        """Run every position through every layer.

        Args:
            hidden: (batch, tokens, width) embeddings.
            position_ids: (batch or 1, tokens); counts from 0 by default.
            attention_mask: boolean, True where attention is allowed: (batch, tokens) over keys, or
                (batch, 1, tokens, tokens) over pairs; or of rows that share a prefix or are packed; None when
                nothing is padded.
            wanted: tokens whose states are returned; all by default. Of the others the last layer computes keys and
                values only.

        Returns:
            (batch, tokens, width) normed hidden states.
        """
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            attention_mask = attention_mask.bool()[:, None, None, :]  # (batch, 1, 1, tokens): over keys only
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        rotation = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta, dtype or hidden.dtype)
        for layer in self.layers[:-1]:
            hidden = layer(hidden, rotation, attention_mask)
        return self.norm(self.layers[-1](hidden, rotation, attention_mask, wanted))
