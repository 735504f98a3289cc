"""Likelihood of a given answer: the Monte Carlo estimate of the masked-diffusion bound (LLaDA, equation 6)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vidlada.decoding.sampler import Request, denoise
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.model.video_model import VidLaDAForMaskedDiffusion


def masked_counts(length: int, samples: int, generator: torch.Generator) -> list[int]:
    """How many of the answer's tokens each sample hides: spread evenly over 1 to `length` from a random start.

    LLaDA's evaluation rounds half to even, which prefers even counts; rounding down prefers none.
    """
    first = int(torch.randint(1, length + 1, (1,), generator=generator))
    return [(first - 1 + i * length // samples) % length + 1 for i in range(samples)]


@torch.inference_mode()
def negative_log_likelihood(
    model: VidLaDAForMaskedDiffusion,
    prompt: Tensor,
    answer_ids: Sequence[int],
    samples: int = 128,
    batch_size: int = 32,
    seed: int = 0,
) -> float:
    """Upper bound of -log p(answer | prompt), in nats over the whole answer.

    With k of the answer's L tokens hidden at random, k uniform on 1 to L, its expectation is that of L / k times the
    cross-entropy of the hidden tokens, added up.

    Args:
        model: in evaluation mode.
        prompt: (tokens, width) embeddings.
        answer_ids: what is to be judged.
        samples: draws of the hidden set.
        batch_size: draws run together.
        seed: of the draws: the same answer length hides the same positions, whatever stands there.

    Raises:
        InputError: the answer is empty, or too long beside the prompt.
    """
    if not answer_ids:
        raise InputError("the answer to be judged is empty")
    length = len(answer_ids)
    if len(prompt) + length > model.config.max_length:
        raise InputError(
            f"prompt and answer take {len(prompt) + length} tokens, more than the model's {model.config.max_length}"
        )
    generator = torch.Generator().manual_seed(seed)
    answer = torch.tensor(list(answer_ids))
    counts = torch.tensor(masked_counts(length, samples, generator))
    ranks = torch.rand(samples, length, generator=generator).argsort(-1).argsort(-1)
    hidden = ranks < counts[:, None]  # (samples, length)
    total = 0.0
    for rows, count in zip(hidden.split(batch_size), counts.split(batch_size), strict=True):
        ids = answer.where(~rows, model.config.mask_token_id).to(prompt.device)
        embedded = model.language_model.embed_tokens(ids)
        sequence = torch.cat((prompt.to(embedded.dtype).expand(len(rows), -1, -1), embedded), dim=1)
        states = model.language_model(sequence, wanted=slice(len(prompt), None))
        logits = model.lm_head(states[rows.to(states.device)]).float()  # (hidden positions, vocabulary)
        losses = F.cross_entropy(logits, answer.expand(len(rows), -1)[rows].to(logits.device), reduction="none")
        weights = (length / count)[:, None].expand(-1, length)[rows]
        total += float((losses.double().cpu() * weights).sum())
    return total / samples


def is_greedy(model: VidLaDAForMaskedDiffusion, prompt: Tensor, answer_ids: Sequence[int]) -> bool:
    """Whether greedy decoding, one token a step in one block of the answer's length, gives exactly the answer."""
    length = len(answer_ids)
    settings = GenerationSettings(gen_length=length, block_length=length)
    *_, (_, state) = denoise(model, [Request(prompt, settings)])
    return state.answer_ids() == list(answer_ids)
