"""Many questions about many videos: each video is decoded ahead of time, encoded once, and asked all its questions."""

import time
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vidlada.api import VidLaDA
from vidlada.conversation import EncodedVideo
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
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
        seconds: this question's share of its batch.
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
        batch_size: questions answered together, of one video or several.
        options: `time_instruction` and `system` of a conversation.
    """

    def __init__(self, vidlada: VidLaDA, sampling: Sampling, batch_size: int = 1, **options: Any):
        self.vidlada, self.sampling, self.batch_size, self.options = vidlada, sampling, batch_size, options

    def replies(self, questions: Sequence[Question]) -> Iterator[Reply]:
        """Answer everything; replies come in the order of the questions, as early as that allows.

        A question that cannot be answered costs nothing but itself: its reply says why.
        """
        batches = batches_of(questions, self.batch_size)
        last_use = {questions[i].video_key: n for n, batch in enumerate(batches) for i in batch}
        needed = (questions[i] for batch in batches for i in batch if questions[i].error is None)
        media: dict[Hashable, tuple[Media, GenerationSettings]] = {}
        for question in needed:
            media.setdefault(question.video_key, (question.media, question.settings))
        encoded: dict[Hashable, list[EncodedVideo] | str] = {}
        done: dict[int, Reply] = {}
        waiting = 0
        with ThreadPoolExecutor(DECODERS) as pool:
            ahead = DecodedAhead(pool, self, list(media.items()))
            try:
                for number, batch in enumerate(batches):
                    started = time.perf_counter()
                    for i in batch:
                        key = questions[i].video_key
                        if key not in encoded and questions[i].error is None:
                            encoded[key] = self.encode(ahead.take(key))
                    videos = [encoded.get(questions[i].video_key, "") for i in batch]
                    replies = self.ask([questions[i] for i in batch], videos)
                    share = (time.perf_counter() - started) / len(batch)
                    for i, reply in zip(batch, replies, strict=True):
                        done[i] = Reply(reply.text, reply.tokens, reply.forward_passes, share, reply.error)
                    for key in [key for key in encoded if last_use[key] <= number]:
                        del encoded[key]
                    while waiting in done:
                        yield done.pop(waiting)
                        waiting += 1
            finally:
                pool.shutdown(cancel_futures=True)

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

    def ask(self, questions: Sequence[Question], videos: Sequence[list[EncodedVideo] | str]) -> list[Reply]:
        """Answer questions of equal settings together; a batch that fails is asked again one by one.

        Args:
            questions: of one batch.
            videos: of each, or why it cannot be seen.
        """
        errors = [
            question.error or (video if isinstance(video, str) else None)
            for question, video in zip(questions, videos, strict=True)
        ]
        good = [i for i, error in enumerate(errors) if error is None]
        replies = [Reply(error=error) for error in errors]
        if not good:
            return replies
        settings = {k: v for k, v in questions[good[0]].settings.to_dict().items() if v is not None}
        try:
            pairs = [(videos[i], questions[i].text) for i in good]
            choices = [questions[i].choices for i in good]
            answers = self.vidlada.ask_many(pairs, choices, generation=settings, **self.options)
        except (InputError, torch.OutOfMemoryError) as error:
            if len(good) > 1:
                for i in good:
                    (replies[i],) = self.ask([questions[i]], [videos[i]])
                return replies
            if not isinstance(error, InputError):
                raise
            replies[good[0]] = Reply(error=str(error))
            return replies
        for i, answer in zip(good, answers, strict=True):
            text = answer.text.removesuffix(".").strip()  # as the published evaluation does
            replies[i] = Reply(text, answer.statistics.tokens, answer.statistics.forward_passes)
        return replies


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


def batches_of(questions: Sequence[Question], size: int) -> list[list[int]]:
    """Numbers of the questions that are answered together: by video in order of first use, then equal settings."""
    by_video: dict[Hashable, list[int]] = {}
    for number, question in enumerate(questions):
        by_video.setdefault(question.video_key, []).append(number)
    batches: list[list[int]] = []
    for number in (number for numbers in by_video.values() for number in numbers):
        fits = batches and len(batches[-1]) < size
        if fits and questions[batches[-1][0]].settings == questions[number].settings:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches
