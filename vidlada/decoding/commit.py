"""Which tokens may be proposed, and which proposals become final in a step: a fixed number, all above a threshold, or
Fast-dLLM's factor rule."""

import torch
from torch import Tensor


def spread(masked: int, steps: int) -> list[int]:
    """Tokens to commit in each step of a block: as even as possible, the first steps take the remainder.

    Args:
        masked: open slots of the block.
        steps: steps it may take.
    """
    base, more = divmod(masked, steps)
    return [base + (step < more) for step in range(steps)]


def most_confident(confidence: Tensor, open_slots: Tensor, count: int) -> Tensor:
    """The `count` most confident open slots, or all of them if there are fewer.

    Args:
        confidence: (block,).
        open_slots: boolean (block,): slots that may be committed.
        count: how many to commit.

    Returns:
        Boolean (block,).
    """
    ranked = confidence.masked_fill(~open_slots, -torch.inf)
    chosen = torch.zeros_like(open_slots)
    chosen[ranked.topk(min(count, int(open_slots.sum()))).indices] = True
    return chosen


def above_threshold(confidence: Tensor, open_slots: Tensor, threshold: float) -> Tensor:
    """Every open slot more confident than `threshold`, at least the most confident one (Fast-dLLM)."""
    chosen = open_slots & (confidence > threshold)
    return chosen if bool(chosen.any()) else most_confident(confidence, open_slots, 1)


def by_factor(confidence: Tensor, open_slots: Tensor, factor: float) -> Tensor:
    """The n most confident open slots for the largest n with (n + 1)(1 - confidence_n) < factor (Fast-dLLM).

    At least one slot is committed.
    """
    ranked = confidence[open_slots].sort(descending=True).values
    counts = torch.arange(1, len(ranked) + 1, device=ranked.device)
    fits = ((counts + 1) * (1 - ranked) < factor).nonzero()
    return most_confident(confidence, open_slots, int(fits[-1]) + 1 if len(fits) else 1)


def within_nucleus(logits: Tensor, top_p: float, temperature: float) -> Tensor:
    """Logits without the tokens outside the nucleus: the fewest likeliest ones that together reach `top_p`.

    Args:
        logits: (block, vocabulary).
        top_p: probability, in (0, 1].
        temperature: that the probabilities are taken at, above 0.

    Returns:
        (block, vocabulary), minus infinity outside.
    """
    ranked, order = (logits.double() / temperature).sort(-1, descending=True)
    probability = ranked.softmax(-1)
    outside = probability.cumsum(-1) - probability >= top_p  # what stands before it is enough; never the first
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
