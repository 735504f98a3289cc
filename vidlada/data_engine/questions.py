"""Multiple-choice questions as language models write and answer them."""

import json
import re
from collections.abc import Sequence
from dataclasses import field
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass

from vidlada.data_engine.endpoints import Endpoint
from vidlada.letters import read_letter
from vidlada.training.data.samples import STRICT

LETTERS = "ABCDEFGH"
END_OF_THOUGHT = "</think>"  # before it, reasoning models say what is not their reply


@dataclass(config=STRICT)
class Candidate:
    """A question on its way.

    Attributes:
        question, answer, wrong: as written.
        calls: every call: role, model, prompt, reply, and whether it was right.
        verdict: `kept`, or why not.
    """

    question: str
    answer: str
    wrong: list[str]
    calls: list[dict[str, Any]] = field(default_factory=list)
    verdict: str = ""


def candidates_in(reply: str) -> list[Candidate]:
    """The questions in a writer's reply; what is not as asked for is left out."""
    found = re.search(r"\[\s*\{", reply.rpartition(END_OF_THOUGHT)[2])
    try:
        values = json.JSONDecoder().raw_decode(found.string, found.start())[0] if found else []
    except (ValueError, RecursionError):
        values = []
    kept = []
    for value in values:
        if not isinstance(value, dict):
            continue
        question, answer, wrong = (value.get(name) for name in ("question", "answer", "wrong"))
        texts = [question, answer, *(wrong if isinstance(wrong, list) else [None])]
        usable = all(isinstance(text, str) and text.strip() and is_unicode(text) for text in texts)
        if usable and 2 <= len(texts) - 1 <= len(LETTERS) and len(set(texts[1:])) == len(texts) - 1:
            first, second, *others = (str(text).strip() for text in texts)
            kept.append(Candidate(first, second, others))
    return kept


def with_choices(candidate: Candidate, endpoint: Endpoint, seed: Sequence[int]) -> tuple[str, str]:
    """The question with its choices in a random order, worded for an endpoint, and the letter of the right one."""
    choices = [candidate.answer, *candidate.wrong]
    order = np.random.default_rng(list(seed)).permutation(len(choices))
    listed = endpoint.between.join(
        endpoint.choice.format(letter=letter, choice=choices[place])
        for letter, place in zip(LETTERS, order, strict=False)
    )
    return endpoint.prompt.format(question=candidate.question, choices=listed), LETTERS[order.tolist().index(0)]


def letter_in(reply: str) -> str | None:
    """The letter a reply chooses; None if it chooses none."""
    return read_letter(reply.rpartition(END_OF_THOUGHT)[2], LETTERS)


def is_unicode(text: str) -> bool:
    """Whether a text can be sent and written; JSON can hold halves of characters, which cannot."""
    return text.encode("utf-8", "ignore").decode() == text
