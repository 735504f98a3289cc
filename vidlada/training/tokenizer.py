"""A word-level tokenizer with the published tokenizer's control tokens, for models trained from nothing."""

import string
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vidlada.messages import BOS, END_HEADER, END_OF_TEXT, END_OF_TURN, MASK, START_HEADER

UNKNOWN = "<|unknown|>"
CONTROL_TOKENS = (BOS, END_OF_TEXT, MASK, START_HEADER, END_HEADER, END_OF_TURN, UNKNOWN)
TEMPLATE_WORDS = ("\n", "\n\n", "system", "user", "assistant")


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows these words, numbers and punctuation marks, each as one token.

    A capital letter at the start of a longer word is read as its small one ("Which" is "which"); single capital
    letters stay, since they name choices.

    Args:
        words: the vocabulary without control tokens.
    """
    entries = dict.fromkeys((*CONTROL_TOKENS, *TEMPLATE_WORDS, *words))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(entries)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(rf"\b{capital}(?=[a-z])"), capital.lower()) for capital in string.ascii_uppercase]
    )
    pieces = Regex(r"\n\n|\n|[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="removed", invert=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def role_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokens with a role, as arguments of `VidLaDAConfig`."""
    names = (BOS, END_OF_TEXT, START_HEADER, END_HEADER, MASK, END_OF_TURN)
    bos, end_of_text, start_header, end_header, mask, end_of_turn = tokenizer.convert_tokens_to_ids(list(names))
    return {
        "bos_token_id": bos,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "mask_token_id": mask,
        "suppressed_token_ids": [end_of_text, bos, start_header, end_header],
        "stop_token_ids": [end_of_turn],
    }
