"""The masked-diffusion objective (LLaDA; VidLaDA section 3): hide some target tokens, predict them, weigh by 1/p."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
MINIMUM_PROBABILITY = 1e-3


@dataclass(frozen=True)
class Masking:
    """Which target positions of a batch are hidden.

    Attributes:
        masked: (batch, tokens) boolean.
        probability: (samples,) with which each sample's targets were hidden.
    """

    masked: Tensor
    probability: Tensor


def draw_masking(
    targets: Tensor,
    sample_index: Tensor,
    generator: torch.Generator,
    force: Tensor | None = None,
    stratified: bool = True,
) -> Masking:
    """Hide each sample's targets with a probability p = (1 - ε) t + ε of its own, t ~ U(0, 1).

    Args:
        targets: (batch, tokens) boolean: positions that may be hidden.
        sample_index: (batch, tokens) number of the sample a position belongs to, counted over the batch;
            negative where it belongs to none. A row may hold several samples that share a video.
        generator: of every random draw, on the CPU.
        force: (samples,) boolean: hide all targets of these samples (one-word answers).
        stratified: spread t evenly over the samples of the batch, which lowers the variance of the loss.
    """
    samples = int(sample_index.max()) + 1
    time = torch.rand(samples, generator=generator)
    if stratified:
        order = torch.randperm(samples, generator=generator)
        time = (order + time) / samples
    probability = (1 - MINIMUM_PROBABILITY) * time + MINIMUM_PROBABILITY
    if force is not None:
        probability = probability.masked_fill(force, 1.0)
    draws = torch.rand(targets.shape, generator=generator)
    return Masking((draws < probability[sample_index.clamp(min=0)]) & targets, probability)


def diffusion_loss(logits: Tensor, labels: Tensor, sample_index: Tensor, masking: Masking) -> Tensor:
    """Mean over samples of Σ over hidden positions of cross-entropy / p / number of the sample's targets.

    Args:
        logits: (hidden positions, vocabulary), in the order of `masking.masked`.
        labels: (batch, tokens) token ids, `IGNORED` where there is no target.
        sample_index: (batch, tokens), as for `draw_masking`.
        masking: what was hidden.

    Returns:
        A scalar in float32.
    """
    is_target = labels != IGNORED
    samples = masking.probability.shape[0]
    counts = torch.zeros(samples, device=labels.device)
    counts = counts.index_add(0, sample_index[is_target], torch.ones_like(sample_index[is_target], dtype=counts.dtype))
    owner = sample_index[masking.masked]
    losses = F.cross_entropy(logits.float(), labels[masking.masked], reduction="none")
    weights = 1 / (masking.probability.to(logits.device)[owner] * counts[owner])
    return (losses * weights).sum() / samples


def separate_samples_mask(sample_index: Tensor, valid: Tensor) -> Tensor:
    """Attention between samples that share a row: all see the shared part and themselves, not one another.

    Args:
        sample_index: (batch, tokens) sample of each position, negative for the shared part (video and system turn).
        valid: (batch, tokens) boolean, False at padding.

    Returns:
        (batch, 1, tokens, tokens) boolean, True where a query (third axis) may attend to a key (last axis).
    """
    owner = sample_index.clamp(min=-1)
    allowed = (owner[:, None, :] == -1) | (owner[:, None, :] == owner[:, :, None])
    return (allowed & valid[:, None, :])[:, None]


def conversation_mask(turn: Tensor, valid: Tensor) -> Tensor:
    """Attention between turns: turn a attends to turn b only if b ≤ a.

    Args:
        turn: (batch, tokens) turn of each position.
        valid: (batch, tokens) boolean, False at padding.

    Returns:
        (batch, 1, tokens, tokens) boolean.
    """
    return ((turn[:, None, :] <= turn[:, :, None]) & valid[:, None, :])[:, None]
