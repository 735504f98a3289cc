"""Random numbers computed from their place: the same on every device, alone and in a batch, in any order.

A counter-based generator (SplitMix64's mixing function, Steele et al. 2014) instead of a stream: the numbers of one
slot and token need no others to be drawn before them, so a GPU makes them where they are needed.
"""

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15 - 2**64  # as signed numbers, which is how PyTorch multiplies modulo 2**64
FACTORS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def mix_bits(numbers: Tensor) -> Tensor:
    """SplitMix64's mixing of int64 numbers."""
    for shift, factor in FACTORS:
        numbers = (numbers ^ _shift_right(numbers, shift)) * factor
    return numbers ^ _shift_right(numbers, 31)


def _shift_right(numbers: Tensor, places: int) -> Tensor:
    """To the right, zeros coming in."""
    return (numbers >> places) & (2 ** (64 - places) - 1)


def uniform(seed: int, draw: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Uniform float64 numbers strictly between 0 and 1.

    Args:
        seed: of the answer.
        draw: how many times numbers were drawn for it before.
        rows, columns: of the result.
        device: where to compute them.
    """
    start = mix_bits(torch.tensor([seed]) * GAMMA + GAMMA)
    offset = int(mix_bits(start + torch.tensor([draw]) * GAMMA))  # on the host: a plain number for the kernel
    counters = torch.arange(rows * columns, device=device).view(rows, columns)
    bits = _shift_right(mix_bits((counters + offset) * GAMMA), 11)  # 53 of them, as many as a float64 holds
    return ((bits.double() + 0.5) * 2.0**-53).clamp_(max=1 - 2.0**-53)  # with all bits set it rounds to 1
