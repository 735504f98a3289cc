"""The masked-diffusion objective (LLaDA; VidLaDA section 3): hide some target tokens, predict them, weigh by 1/p."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vidlada.model.masks import AnyMask, RowMask

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


def draw_times(samples: int, generator: torch.Generator, stratified: bool = True) -> Tensor:
    """Masking times t ~ U(0, 1) of (samples,).

    Args:
        samples: how many.
        generator: on the CPU.
        stratified: spread them evenly over the samples, which lowers the variance of the loss.
    """
    times = torch.rand(samples, generator=generator)
    if stratified:
        order = torch.randperm(samples, generator=generator)
        times = (order + times) / samples
    return times


def draw_masking(
    targets: Tensor, sample_index: Tensor, time: Tensor, generator: torch.Generator, force: Tensor | None = None
) -> Masking:
    """Hide each sample's targets with a probability p = (1 - ε) t + ε of its own.

    Args:
        targets: (batch, tokens) boolean: positions that may be hidden.
        sample_index: (batch, tokens) number of the sample a position belongs to, counted over the batch;
            negative where it belongs to none. A row may hold several samples that share a video.
        time: (samples,) t of each, from `draw_times`.
        generator: of what is hidden, on the CPU.
        force: (samples,) boolean: hide all targets of these samples (one-word answers).
    """
    probability = (1 - MINIMUM_PROBABILITY) * time + MINIMUM_PROBABILITY
    if force is not None:
        probability = probability.masked_fill(force, 1.0)
    draws = torch.rand(targets.shape, generator=generator)
    return Masking((draws < probability[sample_index.clamp(min=0)]) & targets, probability)


def complement(masking: Masking, targets: Tensor, sample_index: Tensor) -> Masking:
    """The other half of a masking: what it leaves visible is hidden (LaViDa). Together they cover every target.

    A sample that is forced has no other half: it is hidden whole again, or it would count half as much as others.

    Args:
        masking: what was hidden.
        targets, sample_index: as for `draw_masking`.
    """
    whole = masking.probability == 1
    hidden = targets & (~masking.masked | whole[sample_index.clamp(min=0)])
    rest = (1 - masking.probability).clamp(min=MINIMUM_PROBABILITY)
    return Masking(hidden, torch.where(whole, masking.probability, rest))


def diffusion_loss(
    logits: Tensor,
    labels: Tensor,
    sample_index: Tensor,
    masking: Masking,
    total_samples: int | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Mean over samples of Σ over hidden positions of cross-entropy / p / number of the sample's targets.

    Args:
        logits: (hidden positions, vocabulary), in the order of `masking.masked`.
        labels: (batch, tokens) token ids, `IGNORED` where there is no target.
        sample_index: (batch, tokens), as for `draw_masking`.
        masking: what was hidden.
        total_samples: divide by this number instead of the batch's own: the batch is a part of so many.
        sample_weight: (samples,) how often each sample counts; once by default.

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
    if sample_weight is not None:
        weights = weights * sample_weight[owner]
    return (losses * weights).sum() / (total_samples or samples)


def next_token_loss(logits: Tensor, labels: Tensor, sample_index: Tensor, total_samples: int | None = None) -> Tensor:
    """The autoregressive twin's loss: mean over samples of the mean cross-entropy of the sample's targets.

    Args:
        logits: (targets, vocabulary) at `before_targets`: each predicts the token after it.
        labels, sample_index, total_samples: as for `diffusion_loss`.
    """
    is_target = labels != IGNORED
    owner = sample_index[is_target]
    counts = torch.bincount(owner)
    losses = F.cross_entropy(logits.float(), labels[is_target], reduction="none")
    return (losses / counts[owner]).sum() / (total_samples or len(counts))


def before_targets(labels: Tensor) -> Tensor:
    """Positions whose next position is a target: (batch, tokens) → (batch, tokens) boolean."""
    return F.pad(labels[:, 1:] != IGNORED, (0, 1))


def causal_mask(attention_mask: AnyMask, tokens: int) -> Tensor:
    """A mask in which, besides what it already forbids, no position attends to a later one.

    Args:
        attention_mask: boolean (batch, tokens) or (batch, 1, tokens, tokens), or of rows that share
            a prefix or are packed, or None.
        tokens: length of a row.

    Returns:
        (batch or 1, 1, tokens, tokens) boolean.
    """
    earlier = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    if attention_mask is None:
        return earlier
    if isinstance(attention_mask, RowMask):
        attention_mask = attention_mask.dense()
    if attention_mask.ndim == 2:
        attention_mask = attention_mask[:, None, None, :]
    return earlier & attention_mask


def conversation_mask(turn: Tensor, valid: Tensor) -> Tensor:
    """Attention between turns: turn a attends to turn b only if b ≤ a.

    Args:
        turn: (batch, tokens) turn of each position.
        valid: (batch, tokens) boolean, False at padding.

    Returns:
        (batch, 1, tokens, tokens) boolean.
    """
    return ((turn[:, None, :] <= turn[:, :, None]) & valid[:, None, :])[:, None]
