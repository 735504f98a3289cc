"""The bidirectional transformer: Llama's layers without a causal mask (LLaDA).

What is special about it:
- every position attends to every position that is not padding;
- norms and rotary angles are computed in float32 whatever the weights' type; the frequencies are never a buffer,
  so casting the module cannot round them (at position 13,000 a bfloat16 frequency is off by whole turns);
- no (tokens, tokens) mask is built unless a caller brings one: padding is a mask over keys only.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vidlada.model.config import VidLaDATextConfig

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class SharedPrefixMask:
    """Rows of a prefix (a video) and several continuations (questions with answers) that do not see one another.

    The prefix attends to itself, a continuation to the prefix and itself: far less than all pairs of a row.

    Attributes:
        sizes: tokens of the prefix and of every continuation, alike in all rows.
        valid: (batch, tokens) boolean, False at padding.
    """

    sizes: tuple[int, ...]
    valid: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SharedPrefixMask) and self.sizes == other.sizes and self.valid.equal(other.valid)

    __hash__ = None  # type: ignore[assignment]

    def to(self, device: torch.device) -> "SharedPrefixMask":
        """The same on a device."""
        return SharedPrefixMask(self.sizes, self.valid.to(device))

    def dense(self) -> Tensor:
        """(batch, 1, tokens, tokens) boolean, True where a query (third axis) may attend to a key (last axis)."""
        part = torch.arange(len(self.sizes), device=self.valid.device)
        part = part.repeat_interleave(torch.tensor(self.sizes, device=part.device))
        allowed = (part[None, :] == 0) | (part[None, :] == part[:, None])
        return (allowed & self.valid[:, None, :])[:, None]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention over (batch, heads, tokens, head_dim), part by part."""
        parts = [states.split(self.sizes, dim=2) for states in (queries, keys, values)]
        valid = self.valid.split(self.sizes, dim=1)
        mixed = []
        for number, (query, key, value) in enumerate(zip(*parts, strict=True)):
            mask = valid[number]
            if number:
                key, value = torch.cat((parts[1][0], key), dim=2), torch.cat((parts[2][0], value), dim=2)
                mask = torch.cat((valid[0], mask), dim=1)
            if mask.all():
                mixed.append(F.scaled_dot_product_attention(query, key, value))
                continue
            # a query without any key would be no number, and padding's values reach others through a weight of zero
            mask = mask | (~mask.any(1, keepdim=True))
            mixed.append(F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :]))
        return torch.cat(mixed, dim=2)


@dataclass(frozen=True, eq=False)
class PackedMask:
    """One row of several sequences, one after another, that do not see one another.

    Attributes:
        sizes: tokens of every sequence; padding is one of its own.
    """

    sizes: tuple[int, ...]

    def to(self, device: torch.device) -> "PackedMask":
        """The same: it holds no tensor."""
        return self

    def dense(self) -> Tensor:
        """(1, 1, tokens, tokens) boolean, True where a query (third axis) may attend to a key (last axis)."""
        part = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        return (part[None, :] == part[:, None])[None, None]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention over (1, heads, tokens, head_dim), sequence by sequence."""
        parts = zip(*(states.split(self.sizes, dim=2) for states in (queries, keys, values)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=2)


RowMask = SharedPrefixMask | PackedMask
AnyMask = Tensor | RowMask | None


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Cosine and sine of the rotary embedding, "rotate half" layout.

    Args:
        position_ids: (batch or 1, tokens) absolute positions.
        head_dim: width of a head.
        theta: base of the frequencies.
        dtype: type of the result; the angles themselves are float32.

    Returns:
        Two tensors of shape (batch or 1, 1, tokens, head_dim), ready to broadcast over heads.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[:, None, :, None].float() * (1 / theta**exponents)  # (batch, 1, tokens, head_dim / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """Apply the rotary embedding to (batch, heads, tokens, head_dim)."""
    cos, sin = rotation
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def attend(queries: Tensor, keys: Tensor, values: Tensor, attention_mask: AnyMask) -> Tensor:
    """Scaled dot-product attention over (batch, heads, tokens, head_dim)."""
    if queries.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # the backward pass of the fused kernel is 1.5 to 5 times slower in bfloat16 than in float32 on a CPU
        with torch.autocast("cpu", enabled=False):
            return attend(queries.float(), keys.float(), values.float(), attention_mask)
    if isinstance(attention_mask, RowMask):
        return attention_mask.attend(queries, keys, values)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=attention_mask)


class RMSNorm(nn.Module):
    """Root-mean-square norm: float32 inside, cast back, then the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden.float(), (hidden.shape[-1],), eps=self.eps)
        return self.weight * normed.to(hidden.dtype)


class Attention(nn.Module):
    """Multi-head attention over all positions, with grouped key/value heads where the configuration has fewer."""

    def __init__(self, config: VidLaDATextConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        key_value_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def heads(self, states: Tensor) -> Tensor:
        """(batch, tokens, width) → (batch, heads, tokens, head_dim)."""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def project(self, hidden: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (batch, heads, tokens, head_dim), and keys and values with the key/value heads; rotated."""
        queries = rotate(self.heads(self.q_proj(hidden)), rotation)
        keys = rotate(self.heads(self.k_proj(hidden)), rotation)
        return queries, keys, self.heads(self.v_proj(hidden))

    def mix(self, queries: Tensor, keys: Tensor, values: Tensor, attention_mask: AnyMask) -> Tensor:
        """What every position sees of the others: (batch, tokens, width)."""
        if self.groups > 1:
            keys, values = (states.repeat_interleave(self.groups, dim=1) for states in (keys, values))
        return attend(queries, keys, values, attention_mask).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: VidLaDATextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Layer(GradientCheckpointingLayer):
    """One pre-norm block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: VidLaDATextConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def compile_parts(self) -> None:
        """Let torch.compile fuse all but attention, once for all layers and any number of tokens."""
        self.enter = torch.compile(self.enter, dynamic=True)  # type: ignore[method-assign]
        self.leave = torch.compile(self.leave, dynamic=True)  # type: ignore[method-assign]

    def enter(self, hidden: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """All before positions meet: queries, keys and values of (batch, tokens, width) states."""
        return self.self_attn.project(self.input_layernorm(hidden), rotation)

    def leave(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """All after: what was seen, (batch, tokens, width), goes into the residual stream."""
        hidden = hidden + self.self_attn.o_proj(mixed)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def forward(self, hidden: Tensor, rotation: Rotation, attention_mask: AnyMask) -> Tensor:
        return self.leave(hidden, self.self_attn.mix(*self.enter(hidden, rotation), attention_mask))


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
        self.enter, self.leave = Layer.enter, Layer.leave  # what a cached pass runs of every layer

    def compile_layers(self) -> None:
        """Let torch.compile fuse what a cached pass runs of every layer, once for all layers and any number of tokens.

        The first passes then take seconds longer.
        """
        self.enter = torch.compile(Layer.enter, dynamic=True)
        self.leave = torch.compile(Layer.leave, dynamic=True)

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: AnyMask = None,
    ) -> Tensor:
        """Run every position through every layer.

        Args:
            hidden: (batch, tokens, width) embeddings.
            position_ids: (batch or 1, tokens); counts from 0 by default.
            attention_mask: boolean, True where attention is allowed: (batch, tokens) over keys, or
                (batch, 1, tokens, tokens) over pairs; or of rows that share a prefix or are packed; None when
                nothing is padded.

        Returns:
            (batch, tokens, width) normed hidden states.
        """
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            attention_mask = attention_mask.bool()[:, None, None, :]  # (batch, 1, 1, tokens): over keys only
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        rotation = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta, dtype or hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, rotation, attention_mask)
        return self.norm(hidden)
