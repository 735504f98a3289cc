"""Conversations about videos and images: encoded media, drafts and answers."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vidlada.decoding.cache import VisualCache
from vidlada.decoding.sampler import Request, State, Statistics
from vidlada.decoding.scoring import score_answers
from vidlada.decoding.streaming import StableText
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings, PromptSettings
from vidlada.messages import Message, place_media, time_instruction, with_think_mode
from vidlada.settings import as_sequence, check_unicode, format_value
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
        return self.request_for(self._user(question))

    def request_for(self, message: Message) -> Request:
        """Build the decoding request for a user message with content parts."""
        shapes = [medium.shape for medium in self.media]
        self.vidlada._check_memory(shapes, self.settings)
        messages = with_think_mode([*self.messages, message], self.settings.think)
        encoded = self.vidlada.processor.encode(messages, shapes)
        model = self.vidlada.model
        empty = torch.empty(0, model.language_model.config.hidden_size, device=model.device, dtype=model.dtype)
        tokens = torch.cat([empty, *(medium.visual_tokens for medium in self.media)])
        return replace(self.vidlada.request(encoded, tokens, self.settings), visual=self.visual)

    def _user(self, question: str) -> Message:
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
        message = self._user(question)
        yield from self.drafts(message)
        self._remember(message)

    def drafts(self, message: Message) -> Iterator[Draft]:
        """Answer a message without adding it to the history, yielding a draft after every step."""
        for state, stable in self.states(message):
            yield self.vidlada.draft(state, "" if stable.thinking else stable.reasoning, stable.thinking)

    def states(self, message: Message) -> Iterator[tuple[State, StableText]]:
        """Answer a message without adding it to the history: the state and certain text after every step. Drafts
        cost time; where nobody sees them, none are built."""
        for _, state, stable in self.vidlada.decode([self.request_for(message)]):
            if stable.finish_reason is not None:
                self.last, self.visual = self.answer(state, stable), state.visual
            yield state, stable

    def ask(self, question: str, choices: Sequence[str] | None = None) -> Answer:
        """Answer the next question; with `choices`, by the most likely of them."""
        if choices is not None:
            self.last = self.choose(question, choices)
            self._remember(self._user(question))
            return self.last
        message = self._user(question)
        for _ in self.states(message):
            pass
        self._remember(message)
        return self.last

    def choose(self, question: str, choices: Sequence[str]) -> Answer:
        """Score the given answers in one forward pass and return the most likely; uses `gen_length` only. A text
        instead of a list is one answer.

        Raises:
            InputError: there is no choice, an empty one, or one twice.
        """
        choices = as_sequence(choices)
        if not isinstance(choices, Sequence) or not all(isinstance(choice, str) for choice in choices):
            raise InputError(f"choices must be a list of texts, not {format_value(choices)}")
        if not choices or not all(choice.strip() for choice in choices) or len(set(choices)) < len(choices):
            raise InputError(f"choices must be different answers, none of them empty, not {list(choices)}")
        started = time.perf_counter()
        request = self.request(question)
        ids = [self.vidlada.processor.text_ids(choice) for choice in choices]
        scores = score_answers(self.vidlada.model, request.prompt, ids, self.settings.gen_length)
        best = int(scores.argmax())
        seconds = {**self.seconds, "scoring": time.perf_counter() - started}
        return Answer(
            text=choices[best],
            token_ids=ids[best],
            finish_reason="stop",
            frame_times=self.times,
            statistics=Statistics(forward_passes=1, seconds=seconds),
            settings=self.settings,
            choices=dict(zip(choices, scores.softmax(0).tolist(), strict=True)),
        )

    def _remember(self, message: Message) -> None:
        """Add the turn to the history if the model was trained on conversations."""
        if self.vidlada.model.config.multi_turn:
            self.messages += [message, {"role": "assistant", "content": self.last.text}]

    def answer(self, state: State, stable: StableText) -> Answer:
        """Build the answer from a finished state and its text."""
        return Answer(
            text=stable.text + self.settings.suffix,
            token_ids=state.answer_ids()[: stable.tokens],
            finish_reason=stable.finish_reason or "length",
            frame_times=self.times,
            statistics=state.statistics.with_seconds(self.seconds),
            settings=self.settings,
            reasoning=stable.reasoning,
        )
