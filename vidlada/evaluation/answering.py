"""Many questions about many videos: each video is decoded ahead of time, encoded once, and asked all its questions."""

import time
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np

from vidlada.api import VidLaDA
from vidlada.conversation import Answer, Conversation, EncodedVideo
from vidlada.engine.choosing import as_choices
from vidlada.engine.entry import ReadyEntry
from vidlada.engine.offline import decode
from vidlada.errors import InputError, VidLaDAError
from vidlada.generation import GenerationSettings, PromptSettings
from vidlada.media import is_image, media_list
from vidlada.tiling import MediaShape
from vidlada.video import Sampling, VideoInfo, sample_frames

DECODERS = 2  # threads; FFmpeg uses further ones itself
VIDEOS_AHEAD = 3  # decoded before they are needed: 28 MB each at 64 frames of 384 pixels

Media = str | np.ndarray | tuple[str | np.ndarray, ...] | None


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        text: as the benchmark words it.
        media: path of a video or a folder of frames; or frames, uint8 (frames, height, width, 3); or an image, uint8
            (height, width, 3); or several of these; or None.
        settings: of decoding.
        choices: answer with the likeliest of these instead of decoding.
        error: why it cannot be asked at all.
    """

    text: str = ""
    media: Media = None
    settings: GenerationSettings = GenerationSettings()
    choices: tuple[str, ...] | None = None
    error: str | None = None

    @property
    def video_key(self) -> Hashable:
        """The same for questions about the same video."""
        return self.media if isinstance(self.media, str) else id(self.media)


@dataclass(frozen=True)
class Reply:
    """The answer to a question, or why there is none.

    Attributes:
        text: the answer; empty when it failed.
        tokens: slots committed.
        forward_passes: through the model.
        seconds: this question's share of the time it was decoded in.
        error: why there is no answer.
    """

    text: str = ""
    tokens: int = 0
    forward_passes: int = 0
    seconds: float = 0.0
    error: str | None = None


class Answerer:
    """Asks a model.

    Args:
        vidlada: the model.
        sampling: frames of a video.
        batch_size: questions decoded together, of one video or several; fewer where memory does not allow it.
        options: `time_instruction` and `system` of a conversation.
    """

    def __init__(self, vidlada: VidLaDA, sampling: Sampling, batch_size: int = 1, **options: Any):
        self.vidlada, self.sampling, self.batch_size, self.options = vidlada, sampling, batch_size, options

    def replies(self, questions: Sequence[Question]) -> Iterator[Reply]:
        """Answer everything; replies come in the order of the questions, as early as that allows.

        A question that cannot be answered costs nothing but itself: its reply says why.
        """
        order = by_video(questions)
        media: dict[Hashable, tuple[Media, GenerationSettings]] = {}
        for question in (questions[number] for number in order):
            if question.error is None:
                media.setdefault(question.video_key, (question.media, question.settings))
        done: dict[int, Reply] = {}
        following = 0
        with ThreadPoolExecutor(DECODERS) as pool:
            ahead = DecodedAhead(pool, self, list(media.items()))
            try:
                for number, reply in self.answers(questions, order, ahead):
                    done[number] = reply
                    while following in done:
                        yield done.pop(following)
                        following += 1
            finally:
                pool.shutdown(cancel_futures=True)

    def answers(
        self, questions: Sequence[Question], order: Sequence[int], ahead: "DecodedAhead"
    ) -> Iterator[tuple[int, Reply]]:
        """Numbers of questions and their replies, as they come.

        Args:
            questions: all of them.
            order: their numbers, as they are to be asked.
            ahead: gives the frames.
        """
        pending: dict[int, tuple[int, Conversation]] = {}  # by their numbers in the engine
        places = count()
        failed: list[tuple[int, Reply]] = []
        seconds: dict[int, float] = {}  # of what is being decoded; who is decoded together shares the time

        def entries() -> Iterator[ReadyEntry]:
            encoded: dict[Hashable, list[EncodedVideo] | str] = {}
            for number in order:
                question = questions[number]
                if question.error is None and question.video_key not in encoded:
                    encoded = {question.video_key: self.encode(ahead.take(question.video_key))}  # the others are done
                found = self.entry(question, encoded.get(question.video_key, ""))
                if isinstance(found, str):
                    failed.append((number, Reply(error=found)))
                    continue
                chat, entry = found
                pending[next(places)] = number, chat
                seconds[number] = 0.0
                yield entry

        started = time.perf_counter()
        for place, update in decode(self.vidlada.model, entries(), self.batch_size):
            now = time.perf_counter()
            for number in seconds:
                seconds[number] += (now - started) / len(seconds)
            started = now
            yield from failed
            failed.clear()
            number, chat = pending[place]
            if isinstance(update, VidLaDAError):
                reply = Reply(error=str(update))
            elif update.stable.finish_reason is not None:
                reply = reply_of(chat.answer(update, questions[number].choices))
            else:
                continue
            del pending[place]
            yield number, replace(reply, seconds=seconds.pop(number))
        yield from failed

    def entry(self, question: Question, media: list[EncodedVideo] | str) -> "tuple[Conversation, ReadyEntry] | str":
        """A question as a conversation and a request for the engine, or why it cannot be asked.

        Args:
            question: to be asked.
            media: what it is about, or why that cannot be seen.
        """
        if question.error is not None or isinstance(media, str):
            return question.error or str(media)
        given = {name: value for name, value in question.settings.to_dict().items() if value is not None}
        try:
            chat = Conversation(self.vidlada, media, self.vidlada.settings(**given), PromptSettings(**self.options))
            return chat, chat.entry(chat.message(question.text), as_choices(question.choices))
        except InputError as error:
            return str(error)

    def decode(self, media: Media, settings: GenerationSettings) -> list[Any]:
        """Frames of videos, at the model's size, and images.

        Args:
            media: of a question.
            settings: of it, for the memory that answering takes.

        Raises:
            InputError: a file cannot be used, or holds more frames than the model or this machine's memory; the
                latter before the first is decoded.
        """
        processor, shapes, decoded = self.vidlada.processor, list[MediaShape](), list[Any]()
        for medium in media_list(media):
            if isinstance(medium, str) and not is_image(medium):

                def check(info: VideoInfo, frames: int) -> None:
                    self.vidlada.check_frames(frames, shapes, settings)

                medium = sample_frames(medium, self.sampling, size=processor.image_size, check=check)
                shapes.append(len(medium.times))
            decoded.append(medium)
        return decoded

    def encode(self, media: "Future[Any]") -> list[EncodedVideo] | str:
        """Visual tokens, or why there are none."""
        try:
            return self.vidlada.encode_media(media.result())
        except InputError as error:
            return str(error)

    def ask(self, question: Question, media: list[EncodedVideo] | str) -> Reply:
        """Answer one question.

        Args:
            question: to be asked.
            media: what it is about, or why that cannot be seen.
        """
        found = self.entry(question, media)
        if isinstance(found, str):
            return Reply(error=found)
        chat, entry = found
        for _, update in decode(self.vidlada.model, [entry]):
            last = update
        return (
            Reply(error=str(last)) if isinstance(last, VidLaDAError) else reply_of(chat.answer(last, question.choices))
        )


def reply_of(answer: Answer) -> Reply:
    """An answer as the published evaluation reads it."""
    text = answer.text.removesuffix(".").strip()
    return Reply(text, answer.statistics.tokens, answer.statistics.forward_passes)


class DecodedAhead:
    """Frames of videos in the order they are needed, a few decoded in the background."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        answerer: Answerer,
        videos: list[tuple[Hashable, tuple[Media, GenerationSettings]]],
    ):
        self.pool, self.answerer, self.left = pool, answerer, iter(videos)
        self.pending: dict[Hashable, Future[Any]] = {}
        self.fill()

    def fill(self) -> None:
        while len(self.pending) < VIDEOS_AHEAD and (following := next(self.left, None)) is not None:
            key, (media, settings) = following
            self.pending[key] = self.pool.submit(self.answerer.decode, media, settings)

    def take(self, key: Hashable) -> "Future[Any]":
        """The frames of a video, each asked for once and in order."""
        future = self.pending.pop(key)
        self.fill()
        return future


def by_video(questions: Sequence[Question]) -> list[int]:
    """Numbers of the questions: by video, in order of first use."""
    numbers: dict[Hashable, list[int]] = {}
    for number, question in enumerate(questions):
        numbers.setdefault(question.video_key, []).append(number)
    return [number for own in numbers.values() for number in own]
