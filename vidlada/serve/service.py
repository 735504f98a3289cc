"""From a client's request to a handle of the engine: fetch, decode, encode the text, queue."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vidlada.api import VidLaDA
from vidlada.decoding.policies import parse_policy
from vidlada.engine.engine import Engine, EngineRequest, MediaInput, RequestHandle
from vidlada.engine.feature_store import LRUCache
from vidlada.machine import MEBI
from vidlada.processor import time_instruction
from vidlada.serve.body import Arrivals
from vidlada.serve.conversation import MediaReference, conversation_of, generation_settings
from vidlada.serve.decoder import Decoders
from vidlada.serve.errors import RequestError
from vidlada.serve.files import FileStore
from vidlada.serve.limits import Limits
from vidlada.serve.media import MediaSource
from vidlada.serve.schema import ChatRequest
from vidlada.serve.threads import LONG_TEXT, TEXT, in_thread
from vidlada.video import Frames, Sampling

LONG_TEXT_CHARACTERS = 2**13
MOST_PREVIEWS = 32


@dataclass(frozen=True)
class Submitted:
    """A request on its way.

    Attributes:
        handle: of the engine.
        seconds: spent on fetching and on decoding media.
    """

    handle: RequestHandle
    seconds: dict[str, float]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, visual ones included."""
        return len(self.handle.job.encoded.input_ids)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the prompt."""
        return sum(index >= 0 for index in self.handle.job.encoded.frame_index)


class Service:
    """A model being served.

    Args:
        vidlada: the model.
        limits: of everything.
        folder: for temporary files.
        allowed: folder that local paths must lie in; None refuses them.
        private_urls: also fetch from addresses that are not public.
    """

    def __init__(
        self, vidlada: VidLaDA, limits: Limits, folder: Path, allowed: Path | None = None, private_urls: bool = False
    ):
        self.vidlada, self.limits = vidlada, limits
        self.engine = Engine(vidlada, limits)
        self.decoders = Decoders(limits, vidlada.processor.image_size)
        self.files = FileStore(folder, limits)
        self.media = MediaSource(folder, limits, self.files, allowed, private_urls)
        self.frames: LRUCache[Frames] = LRUCache(limits.frame_store_mb * MEBI)
        self.decoding: dict[object, asyncio.Task[Frames]] = {}
        self.arrivals = Arrivals(limits)
        self.admitted = self.previewing = 0
        self.previews = asyncio.Semaphore(max(1, limits.decode_workers - 1))  # questions wait for one of them at most

    async def close(self) -> None:
        """End the worker processes and the engine."""
        await self.decoders.close()
        await asyncio.to_thread(self.engine.close)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """A place for one request, from the end of its body to the end of its answer; 429 if there is none."""
        self.refuse_if_full()
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    @contextmanager
    def admit_preview(self) -> Iterator[None]:
        """A place for one preview, which are not those of questions; 429 if there is none."""
        if self.previewing >= MOST_PREVIEWS:
            raise RequestError(429, f"{self.previewing} previews are being made; try later", "queue_full")
        self.previewing += 1
        try:
            yield
        finally:
            self.previewing -= 1

    def refuse_if_full(self) -> None:
        """429 if there is no place."""
        if self.admitted >= self.limits.max_admitted:
            raise RequestError(429, f"{self.admitted} requests are being answered or waiting; try later", "queue_full")

    async def submit(self, request: ChatRequest, owner: str = "") -> Submitted:
        """Prepare a request and queue it.

        Raises:
            RequestError, InputError: it cannot be answered, and why.
        """
        base = self.vidlada.settings()
        settings, max_tokens = generation_settings(request, base, self.limits.max_tokens)
        parse_policy(settings.cache)
        messages, references = conversation_of(request.messages, self.vidlada.model.config.multi_turn)
        if len(references) > self.limits.max_media:
            message = f"{len(references)} videos and images are more than the {self.limits.max_media} allowed"
            raise RequestError(422, message, "too_many_media", "messages")
        if references and self.vidlada.model.config.text_only:
            raise RequestError(422, "this model is text-only; it cannot see videos", "text_only", "messages")
        if request.time_instruction and len(references) != 1:
            message = f"time_instruction needs exactly one video, not {len(references)}"
            raise RequestError(422, message, "bad_time_instruction", "time_instruction")
        sampling = self.sampling(request.frames, request.fps, request.force_sample)
        seconds = {"fetch": 0.0, "video": 0.0}
        videos = [await self.show(reference, sampling, owner, seconds) for reference in references]
        if request.time_instruction:
            frames = videos[0].frames
            (shown,) = [m for m in messages if isinstance(m["content"], list)]
            text = shown["content"][-1]
            text["text"] = f"{time_instruction(frames.times, frames.info.duration)}\n{text['text']}"
        counts = [len(video.frames.times) for video in videos]
        is_long = sum(len(str(message["content"])) for message in messages) > LONG_TEXT_CHARACTERS
        encoded = await in_thread(LONG_TEXT if is_long else TEXT, self.vidlada.processor.encode, messages, counts)
        job = EngineRequest(encoded, videos, settings, max_tokens)
        most = self.vidlada.processor.max_length
        if job.tokens > most:
            message = f"prompt and answer slots take {job.tokens} tokens, more than the model's {most}"
            raise RequestError(422, f"{message}; use fewer frames or a smaller max_tokens", "context_length_exceeded")
        return Submitted(self.engine.submit(job), seconds)

    def sampling(self, frames: int | None, fps: float | None, force_sample: bool | None) -> Sampling:
        """How to sample, within the limits; None stands for a default."""
        most = self.limits.max_frames
        if frames is None:
            frames = min(Sampling().max_frames, most)
        if frames > most:
            raise RequestError(422, f"{frames} frames are more than the {most} allowed", "too_many_frames", "frames")
        return Sampling(Sampling().fps if fps is None else fps, frames, bool(force_sample))

    async def show(
        self, reference: MediaReference, sampling: Sampling, owner: str, seconds: dict[str, float]
    ) -> MediaInput:
        """Sampled frames of a reference; decoded once, however many ask for them at the same time."""
        if reference.is_image:
            sampling = Sampling(max_frames=1)
        started = time.perf_counter()
        async with self.media.open(reference.url, owner) as medium:
            fetched = time.perf_counter()
            seconds["fetch"] += fetched - started
            key = (medium.key, sampling)
            frames = self.frames.get(key) or await self._decode(key, medium.path, sampling)
            seconds["video"] += time.perf_counter() - fetched
        return MediaInput(key, frames)

    async def _decode(self, key: tuple[str, Sampling], path: Path, sampling: Sampling) -> Frames:
        while (other := self.decoding.get(key)) is not None:
            await asyncio.wait([other])
            if not other.cancelled():  # else its client has gone, and it is our turn
                return other.result()
        task = asyncio.ensure_future(self.decoders.decode(path, sampling))
        self.decoding[key] = task
        try:
            frames = await task
        finally:
            del self.decoding[key]
        self.frames.put(key, frames, frames.images.nbytes)
        return frames
