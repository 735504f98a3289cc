"""The rotary position embedding."""

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]


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


def rotation_table(tokens: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rotary angles of positions 0, 1, …, to be taken by `index_select` in every pass.

    Returns:
        (2, tokens, head_dim): cosine, and sine with the sign that `rotate_` needs in the first half.
    """
    cos, sin = rotary_angles(torch.arange(tokens, device=device)[None], head_dim, theta, dtype)
    first, second = sin[0, 0].chunk(2, dim=-1)
    return torch.stack((cos[0, 0], torch.cat((-first, second), dim=-1)))


def rotate_(states: Tensor, rotation: Tensor) -> None:
    """Apply the rotary embedding in place, in three kernels.

    Args:
        states: (heads, tokens, head_dim).
        rotation: (2, tokens, head_dim) rows of `rotation_table`.
    """
    cos, sin = rotation
    first, second = states.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    states.mul_(cos).addcmul_(swapped, sin)
