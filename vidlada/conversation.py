"""Conversations about videos and images: encoded media, drafts and answers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vidlada.decoding.cache import VisualCache
from vidlada.decoding.sampler import Request, State, Statistics
from vidlada.decoding.streaming import StableText
from vidlada.decoding.thinking import Turn
from vidlada.engine.choosing import ChoosingTurn, as_choices
from vidlada.engine.entry import ReadyEntry, Update
from vidlada.engine.offline import decode
from vidlada.engine.prompts import build_request
from vidlada.errors import InputError, VidLaDAError
from vidlada.generation import GenerationSettings, PromptSettings
from vidlada.messages import Message, place_media, time_instruction, with_think_mode
from vidlada.model.parallel import least_of_processes
from vidlada.settings import check_unicode
from vidlada.tiling import MediaShape
from vidlada.video import VideoInfo


@dataclass(frozen=True)
class EncodedVideo:
    """A video or an image as visual tokens: any number of questions may be asked about it without encoding it again.

    Attributes:
        visual_tokens: (visual tokens, width).
        times: seconds of each frame from the video's start; 0 for an image.
        info: what the file is; None for frames given as an array.
        seconds: time spent in `video` (decoding) and `vision` (the tower).
        shape: number of frames, or shape of the image.
        is_image: it is one.
    """

    visual_tokens: Tensor
    times: tuple[float, ...]
    info: VideoInfo | None
    seconds: dict[str, float]
    shape: MediaShape
    is_image: bool = False

    @property
    def duration(self) -> float:
        """Duration in seconds; for an array of frames, the time of the last frame."""
        if self.info is not None:
            return self.info.duration
        return self.times[-1] if self.times else 0.0


@dataclass(frozen=True)
class Draft:
    """A partial answer after a denoising step.

    Attributes:
        state: the decoding loop's snapshot.
        pieces: text of every slot and whether it is final; None text where nothing was proposed yet.
        text: the text so far, without undecided slots.
        reasoning: the thought so far.
    """

    state: State
    pieces: tuple[tuple[str | None, bool], ...]
    text: str
    reasoning: str = ""


@dataclass(frozen=True)
class Answer:
    """An answer and how it was decoded.

    Attributes:
        text: the answer.
        reasoning: the thought before it; empty without one.
        token_ids: the answer's tokens, without the end of turn.
        finish_reason: `stop` when the model ended the answer, `length` when the slots ran out.
        frame_times: seconds of the frames the model saw, of all videos and images in order.
        statistics: steps, forward passes, tokens, seconds per phase.
        settings: how it was decoded.
        choices: probability of each answer that was given to choose from, relative to the others.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    frame_times: tuple[float, ...]
    statistics: Statistics
    settings: GenerationSettings = field(repr=False)
    reasoning: str = ""
    choices: dict[str, float] | None = None

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


class Conversation:
    """A conversation about videos and images, which are encoded once.

    Args:
        vidlada: the model.
        media: already encoded, in the order in which they are shown.
        settings: of decoding.
        prompt: what is put beside the question.
    """

    def __init__(
        self,
        vidlada: Any,  # VidLaDA, which imports this
        media: Sequence[EncodedVideo],
        settings: GenerationSettings,
        prompt: PromptSettings | None = None,
    ):
        self.vidlada, self.settings = vidlada, settings
        self.media = [medium for medium in media if medium.times]
        self.prompt = prompt or PromptSettings()
        self.visual: VisualCache | None = None  # of the last answer, with `reuse`
        self.messages: list[Message] = (
            [] if self.prompt.system is None else [{"role": "system", "content": self.prompt.system}]
        )

    @property
    def times(self) -> tuple[float, ...]:
        """Time of every frame in seconds, over all media in order."""
        return tuple(time for medium in self.media for time in medium.times)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent on all media, by phase."""
        phases = dict.fromkeys(phase for medium in self.media for phase in medium.seconds)
        return {phase: sum(medium.seconds.get(phase, 0.0) for medium in self.media) for phase in phases}

    def request(self, question: str) -> Request:
        """Build the decoding request for the next question."""
        self.check_memory()
        return self.request_for(self.message(question))

    @property
    def shapes(self) -> list[MediaShape]:
        """Of the media, in order."""
        return [medium.shape for medium in self.media]

    def check_memory(self) -> None:
        """Refuse a question that cannot fit into what memory is free now.

        Raises:
            InputError: that is so.
        """
        self.vidlada._check_memory(self.shapes, self.settings)

    def request_for(self, message: Message) -> Request:
        """Build the decoding request for a user message with content parts."""
        messages = with_think_mode([*self.messages, message], self.settings.think)
        encoded = self.vidlada.processor.encode(messages, self.shapes)
        model = self.vidlada.model
        empty = torch.empty(0, model.language_model.config.hidden_size, device=model.device, dtype=model.dtype)
        tokens = torch.cat([empty, *(medium.visual_tokens for medium in self.media)])
        request = build_request(model, self.vidlada.processor, encoded, tokens, self.settings)
        return replace(request, visual=self.visual)

    def entry(self, message: Message, choices: Sequence[str] | None = None) -> ReadyEntry:
        """The engine's request for a user message, answered with the likeliest of `choices` where there are any.

        It may be made while others are decoded: whether it fits beside them is for the engine to say.
        """
        request, model, processor = self.request_for(message), self.vidlada.model, self.vidlada.processor
        if choices is None:
            return ReadyEntry(request, model, partial(Turn, request, processor, model))
        return ReadyEntry(request, model, partial(ChoosingTurn, model, processor, request, choices), chooses=True)

    def message(self, question: str) -> Message:
        """The user's message for a question, with the media's places if it is the first.

        Raises:
            InputError: the question is empty, or the times of several videos are asked for.
        """
        check_unicode("the question", question)
        if not question.strip():
            raise InputError("the question is empty; ask something about the video")
        if not self.media or any(message["role"] == "user" for message in self.messages):
            return {"role": "user", "content": question}
        if self.prompt.time_instruction:
            videos = [medium for medium in self.media if not medium.is_image]
            if len(videos) != 1:
                raise InputError(f"time_instruction names the times of one video, not of {len(videos)}")
            question = f"{time_instruction(videos[0].times, videos[0].duration)}\n{question}"
        parts = [{"type": "image" if medium.is_image else "video"} for medium in self.media]
        return {"role": "user", "content": place_media(question, parts)}

    def stream(self, question: str) -> Iterator[Draft]:
        """Answer the next question, yielding a draft after every step.

        Models trained on conversations (`config.multi_turn`) see the earlier questions and answers.
        """
        message = self.message(question)
        yield from self.drafts(message)
        self._remember(message)

    def drafts(self, message: Message) -> Iterator[Draft]:
        """Answer a message without adding it to the history, yielding a draft after every step."""
        for state, stable in self.states(message):
            yield self.vidlada.draft(state, "" if stable.thinking else stable.reasoning, stable.thinking)

    def states(self, message: Message, choices: Sequence[str] | None = None) -> Iterator[tuple[State, StableText]]:
        """Answer a message without adding it to the history: the state and certain text after every step. Drafts
        cost time; where nobody sees them, none are built."""
        choices = as_choices(choices)
        self.check_memory()
        for _, update in decode(self.vidlada.model, [self.entry(message, choices)]):
            if isinstance(update, VidLaDAError):
                raise update
            if update.stable.finish_reason is not None:
                self.last = self.answer(update, choices)
                if choices is None:
                    self.visual = self._kept_by_all(update.state.visual)
            yield update.state, update.stable

    def _kept_by_all(self, visual: VisualCache | None) -> VisualCache | None:
        """What the next question may reuse: with tensor parallelism nothing, where a process had no memory for it."""
        model = self.vidlada.model.language_model
        if self.settings.reuse and model.processes > 1 and not least_of_processes(model.layers[0], visual is not None):
            return None
        return visual

    def complete(self, message: Message, choices: Sequence[str] | None = None) -> Answer:
        """Answer a message without adding it to the history."""
        for _ in self.states(message, choices):
            pass
        return self.last

    def ask(self, question: str, choices: Sequence[str] | None = None) -> Answer:
        """Answer the next question.

        Args:
            question: text.
            choices: answer with the likeliest of these, found in one pass; of the settings only `gen_length` counts.
                A text instead of a list is one answer.

        Raises:
            InputError: there is no choice, an empty one, or one twice.
        """
        message = self.message(question)
        answer = self.complete(message, choices)
        self._remember(message)
        return answer

    def _remember(self, message: Message) -> None:
        """Add the turn to the history if the model was trained on conversations."""
        if self.vidlada.model.config.multi_turn:
            self.messages += [message, {"role": "assistant", "content": self.last.text}]

    def answer(self, update: Update, choices: Sequence[str] | None = None) -> Answer:
        """Build the answer from a request's last update."""
        state, stable = update.state, update.stable
        return Answer(
            text=stable.text + (self.settings.suffix if choices is None else ""),
            token_ids=state.answer_ids()[: stable.tokens],
            finish_reason=stable.finish_reason or "length",
            frame_times=self.times,
            statistics=state.statistics.with_seconds(self.seconds),
            settings=self.settings,
            reasoning=stable.reasoning,
            choices=None if choices is None else dict(zip(choices, map(math.exp, update.choices), strict=True)),
        )
