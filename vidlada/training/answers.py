"""Answers to questions of training samples, decoded as at inference."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from vidlada.decoding.request import Request
from vidlada.decoding.thinking import Turn
from vidlada.engine.entry import ReadyEntry
from vidlada.engine.offline import decode
from vidlada.engine.prompts import build_request
from vidlada.errors import InputError, VidLaDAError
from vidlada.generation import GenerationSettings
from vidlada.messages import pieces_of
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.processor import VidLaDAProcessor
from vidlada.training.data.collate import StepDataset, messages_of
from vidlada.training.data.samples import Item, Sample

AT_ONCE = 16  # questions decoded together


@dataclass(frozen=True)
class AskedQuestion:
    """A question of a sample.

    Attributes:
        dataset: loads the sample.
        item: the sample.
        number: of the exchange; in a conversation those before it are shown as they are.
        answer: the right one.
    """

    dataset: StepDataset
    item: Item
    number: int
    answer: str


def answer_questions(
    model: VidLaDAForMaskedDiffusion,
    processor: VidLaDAProcessor,
    questions: Sequence[AskedQuestion],
    settings: GenerationSettings,
) -> list[str]:
    """The model's answers; empty where a sample is broken.

    Args:
        model: in evaluation mode.
        processor: of the model.
        questions: any number, of which a few are decoded together.
        settings: of decoding.
    """
    texts = [""] * len(questions)
    places: list[int] = []  # of what is decoded

    def entries() -> Iterator[ReadyEntry]:
        for place, request in requests_for(model, processor, questions, settings):
            places.append(place)
            yield ReadyEntry(request, model, partial(Turn, request, processor, model))

    # sharded weights are elsewhere in every evaluation, where captured graphs would not look for them
    for number, update in decode(model, entries(), AT_ONCE, static=False):
        if isinstance(update, VidLaDAError):
            raise update
        texts[places[number]] = update.stable.text
    return texts


@torch.inference_mode()
def requests_for(
    model: VidLaDAForMaskedDiffusion,
    processor: VidLaDAProcessor,
    questions: Sequence[AskedQuestion],
    settings: GenerationSettings,
) -> Iterator[tuple[int, Request]]:
    """Requests that answer questions, with their numbers; broken samples are left out. Questions of one sample that
    follow each other share its visual tokens."""
    item: Item | None = None
    sample: Sample | None = None
    visual: list[torch.Tensor] = []
    empty = torch.empty(0, model.language_model.config.hidden_size, device=model.device, dtype=model.dtype)
    for place, question in enumerate(questions):
        if question.item is not item:
            item, sample, visual = question.item, sample_of(question), []
            if sample is not None and sample.videos:
                pixels = torch.cat([processor.pixel_values(video) for video in sample.videos])
                visual = model.encode_media(pixels.to(model.device, model.dtype), list(sample.shapes))
        if sample is None:
            continue
        exchanges = [sample.exchanges[question.number]] if sample.separate else sample.exchanges
        turns = 0 if sample.separate else question.number
        messages = messages_of(sample.shapes, exchanges, sample.system)
        messages = messages[: (sample.system is not None) + 2 * turns + 1]
        shown = sum(not isinstance(piece, str) for message in messages for piece in pieces_of(message))
        encoded = processor.encode(messages, sample.shapes[:shown])
        tokens = torch.cat([empty, *visual[:shown]])
        yield place, build_request(model, processor, encoded, tokens, settings)


def sample_of(question: AskedQuestion) -> Sample | None:
    """The sample of a question; None where it is broken."""
    try:
        return question.dataset.sample(question.item)
    except InputError:
        return None


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one but for case, spaces, and a full stop at the end."""
    return plain_words(answer) == plain_words(expected)


def plain_words(text: str) -> str:
    """A text in small letters, with single spaces and without its last full stop."""
    return " ".join(text.casefold().strip().rstrip(".").split())
