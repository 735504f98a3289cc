"""Tokens added to a model that lacks them."""

import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from vidlada.messages import THINK_TOKENS
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.processor import VidLaDAProcessor


def add_think_tokens(model: VidLaDAForMaskedDiffusion, processor: VidLaDAProcessor) -> VidLaDAProcessor:
    """Add the tokens of think mode that the tokenizer lacks; embeddings and head grow by as many rows as they need.

    A new row starts at the mean of the others: a token the model treats as any other.

    Args:
        model: changed in place.
        processor: of it; its tokenizer is changed in place.

    Returns:
        A processor that knows the tokens.
    """
    tokenizer = add_think_tokens_to(processor.tokenizer)
    rows, text = len(tokenizer), model.config.text
    if rows > text.vocab_size:
        tied = model.config.tie_word_embeddings
        embedding = model.language_model.embed_tokens
        for module in (embedding,) if tied else (embedding, model.lm_head):
            module.weight = torch.nn.Parameter(add_rows(module.weight.detach(), rows), module.weight.requires_grad)
        if tied:
            model.lm_head.weight = embedding.weight
        embedding.num_embeddings = model.lm_head.out_features = rows
        text.vocab_size = rows
    return VidLaDAProcessor.from_config(tokenizer, model.config)


def add_think_tokens_to(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, changed in place."""
    tokens = [AddedToken(token, special=True, normalized=False) for token in THINK_TOKENS]
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


def add_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """(vocabulary, width) with rows added at the mean of the others."""
    mean = weight.mean(0, keepdim=True)
    return torch.cat((weight, mean.expand(rows - len(weight), -1)))
