"""Answering with the likeliest of given choices, in one pass instead of decoding."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from vidlada.decoding.sampler import Request, State, Statistics
from vidlada.decoding.scoring import score_answers
from vidlada.decoding.streaming import StableText
from vidlada.errors import InputError
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.processor import VidLaDAProcessor
from vidlada.settings import as_sequence, format_value


def as_choices(choices: Any) -> tuple[str, ...] | None:
    """Answers to choose from, checked; a text is one answer, None stays None.

    Raises:
        InputError: there is no choice, an empty one, or one twice.
    """
    if choices is None:
        return None
    choices = as_sequence(choices)
    if not isinstance(choices, Sequence) or not all(isinstance(choice, str) for choice in choices):
        raise InputError(f"choices must be a list of texts, not {format_value(choices)}")
    if not choices or not all(choice.strip() for choice in choices) or len(set(choices)) < len(choices):
        raise InputError(f"choices must be different answers, none of them empty, not {list(choices)}")
    return tuple(choices)


class ChoosingTurn:
    """An answer that takes one step.

    Args:
        model, processor: that answer.
        request: whose prompt and slots count.
        choices: texts, as `as_choices` gives them.
    """

    def __init__(
        self,
        model: VidLaDAForMaskedDiffusion,
        processor: VidLaDAProcessor,
        request: Request,
        choices: Sequence[str],
    ):
        self.model, self.processor, self.request, self.choices = model, processor, request, choices
        self.statistics, self.choosing = Statistics(), True

    def step(self) -> tuple[State, StableText, tuple[float, ...]]:
        """The likeliest choice as a finished answer, and the log-probability of every choice among the choices.

        Raises:
            InputError: a choice has no tokens, or is too long.
        """
        started = time.perf_counter()
        model, request = self.model, self.request
        ids = [self.processor.text_ids(choice) for choice in self.choices]
        scores = score_answers(model, request.prompt, ids, request.settings.gen_length).log_softmax(-1)
        best = int(scores.argmax())
        answer = torch.tensor(ids[best])
        layers = model.language_model.config.num_hidden_layers
        statistics = Statistics(
            steps=1,
            forward_passes=1,
            tokens=len(answer),
            layer_tokens=(len(request.prompt) + max(request.settings.gen_length, len(answer)),) * layers,
            seconds={"denoising": time.perf_counter() - started},
            visual_tokens=request.visual_tokens,
            merged=request.merged,
        )
        committed = torch.ones(len(answer), dtype=torch.bool)
        confidence = torch.full((len(answer),), float(scores[best].exp()))
        self.choosing = False
        state = State(1, answer, committed, confidence, None, True, statistics)
        return state, StableText(self.choices[best], len(answer), "stop"), tuple(scores.tolist())
