"""Choosing between given answers by how likely each is, in one pass and without decoding anything."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vidlada.decoding.attention import upload
from vidlada.decoding.request import check_predictions
from vidlada.errors import InputError
from vidlada.model.video_model import VidLaDAForMaskedDiffusion


@torch.inference_mode()
def score_answers(
    model: VidLaDAForMaskedDiffusion, prompt: Tensor, answers: Sequence[Sequence[int]], slots: int
) -> Tensor:
    """Log-likelihood of each answer where every slot is masked.

    The masked-diffusion model predicts all slots independently then, so one pass serves any number of answers: each
    answer's score is the sum of its tokens' log-probabilities, end of turn included.

    Args:
        model: in evaluation mode.
        prompt: (tokens, width) embeddings, visual tokens spliced in.
        answers: token ids of each, without the end of turn.
        slots: how many masked slots follow the prompt; at least as many as the longest answer needs.

    Returns:
        (answers,) float32 on the CPU.

    Raises:
        InputError: there is nothing to choose between, an answer is empty, or all are too long for the model.
        VidLaDAError: the predictions are not numbers.
    """
    if not answers or not all(answers):
        raise InputError(f"give at least one answer to score, none of them empty, not {list(map(list, answers))}")
    config = model.config
    end = list(config.stop_token_ids)[:1]
    closed = [[*answer, *end] for answer in answers]
    slots = max(slots, *map(len, closed))
    if len(prompt) + slots > config.max_length:
        raise InputError(
            f"prompt and answer slots take {len(prompt) + slots} tokens, more than the model's {config.max_length}"
        )
    ids = torch.full((slots,), config.mask_token_id, device=prompt.device)
    embedded = model.language_model.embed_tokens(ids)
    sequence = torch.cat((prompt.to(embedded.dtype), embedded))[None]
    wanted = slice(len(prompt), len(prompt) + max(map(len, closed)))
    logits = model.lm_head(model.language_model(sequence, wanted=wanted)[0]).float()
    suppressed = np.array([token for token in config.suppressed_token_ids if token not in end], dtype=np.int64)
    logits.index_fill_(-1, upload({"": suppressed}, logits.device)[""], -torch.inf)
    return sum_log_probabilities(logits, closed)


def sum_log_probabilities(logits: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
    """Log-likelihood of each answer, its slots predicted independently.

    Args:
        logits: (slots, vocabulary) float32, at least as many slots as the longest answer has tokens.
        answers: token ids of each.

    Returns:
        (answers,) float32 on the CPU.

    Raises:
        VidLaDAError: the predictions are not numbers.
    """
    log_probabilities = logits.log_softmax(-1).cpu()
    scores = torch.stack([log_probabilities[range(len(ids)), ids].sum() for ids in answers])
    check_predictions(scores)
    return scores
