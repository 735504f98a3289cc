"""Attention, and the masks of rows that hold more than one sequence."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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


def attend(queries: Tensor, keys: Tensor, values: Tensor, attention_mask: AnyMask) -> Tensor:
    """Scaled dot-product attention over (batch, heads, tokens, head_dim)."""
    if queries.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # the backward pass of the fused kernel is 1.5 to 5 times slower in bfloat16 than in float32 on a CPU
        with torch.autocast("cpu", enabled=False):
            return attend(queries.float(), keys.float(), values.float(), attention_mask)
    if isinstance(attention_mask, RowMask):
        return attention_mask.attend(queries, keys, values)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=attention_mask)
