"""From a client's request to a handle of the engine: fetch, decode, encode the text, queue."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from vidlada.api import VidLaDA
from vidlada.decoding.choices import check_choices
from vidlada.engine.engine import Engine, EngineRequest, MediaInput, RequestHandle
from vidlada.engine.feature_store import LRUCache
from vidlada.generation import GenerationSettings, PromptSettings
from vidlada.machine import MEBI
from vidlada.processor import BOS, EncodedConversation, time_instruction, with_think_mode
from vidlada.serve.body import Arrivals
from vidlada.serve.conversation import MediaReference, conversation_of, generation_settings, with_seed
from vidlada.serve.decoder import Decoders
from vidlada.serve.errors import RequestError
from vidlada.serve.files import FileStore
from vidlada.serve.limits import Limits
from vidlada.serve.media import MediaSource
from vidlada.serve.schema import AnswerRequest, ChatRequest
from vidlada.serve.threads import LONG_TEXT, TEXT, in_thread
from vidlada.video import Frames, Sampling

LONG_TEXT_CHARACTERS = 2**13
MOST_PREVIEWS = 32
Result = TypeVar("Result")


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
        self.decoders = Decoders(limits, vidlada.processor.image_size, vidlada.processor.most_frames)
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

    async def submit(self, request: AnswerRequest, owner: str = "") -> list[Submitted]:
        """Prepare a request and queue its answers: `n` of them for every prompt.

        Raises:
            RequestError, InputError: it cannot be answered, and why.
        """
        jobs, seconds = await self.prepare(request, owner)
        found = []
        for job in jobs:
            for number in range(request.n):
                each = replace(job, settings=with_seed(job.settings, number))
                found.append(Submitted(self.engine.submit(each), seconds))
        return found

    async def prepare(self, request: AnswerRequest, owner: str = "") -> tuple[list[EngineRequest], dict[str, float]]:
        """Fetch, decode and encode what a request says.

        Args:
            request: of chat, of completions (then a job for every prompt), or of the tokenizer.
            owner: of the uploads it may name.

        Returns:
            What to ask the engine, and seconds by phase.

        Raises:
            RequestError, InputError: it cannot be answered, and why.
        """
        base = self.vidlada.settings()
        settings, max_tokens = generation_settings(request, base, self.limits.max_tokens, self.limits.max_thought)
        check_choices(settings)
        seconds = {"fetch": 0.0, "video": 0.0}
        choices = tuple(request.guided_choice or ())
        if not isinstance(request, ChatRequest):
            prompts = request.prompts
            size = sum(map(len, prompts))
            encoded_all = await self._encode(size, lambda: [self.plain_text(prompt) for prompt in prompts])
            return [
                self.checked(EngineRequest(each, [], settings, max_tokens, choices, True)) for each in encoded_all
            ], seconds
        conversation = conversation_of(request.messages, self.vidlada.model.config.multi_turn)
        messages, references, prefix = conversation.messages, conversation.media, conversation.prefix
        if request.continue_final_message and not prefix:
            message = "there is nothing to continue: the last message is not the assistant's"
            raise RequestError(422, message, "bad_messages", "continue_final_message")
        if len(references) > self.limits.max_media:
            message = f"{len(references)} videos and images are more than the {self.limits.max_media} allowed"
            raise RequestError(422, message, "too_many_media", "messages")
        if references and self.vidlada.model.config.text_only:
            raise RequestError(422, "this model is text-only; it cannot see videos", "text_only", "messages")
        if request.time_instruction and len(references) != 1:
            message = f"time_instruction needs exactly one video, not {len(references)}"
            raise RequestError(422, message, "bad_time_instruction", "time_instruction")
        most = self.vidlada.processor.max_length
        if len(references) * self.vidlada.model.config.tokens_per_frame() > most:  # before any is fetched
            message = f"{len(references)} videos and images cannot fit into the model's {most} tokens"
            raise RequestError(422, message, "context_length_exceeded", "messages")
        frames_asked = request.frames
        if frames_asked == "auto":
            frames_asked = self.frames_that_fit(references, settings, request.time_instruction)
        sampling = self.sampling(frames_asked, request.fps, request.force_sample, request.background)
        alone = sum(reference.is_image for reference in references) == 1
        videos = [await self.show(reference, sampling, owner, seconds, alone) for reference in references]
        if request.time_instruction:
            frames = videos[0].frames
            (shown,) = [m for m in messages if isinstance(m["content"], list)]
            text = shown["content"][-1]
            text["text"] = f"{time_instruction(frames.times, frames.info.duration)}\n{text['text']}"
        messages = with_think_mode(messages, settings.think)
        if prefix:  # the answer has begun: it is too late for a thought
            settings = replace(settings, think=None)
        counts = [video.shape for video in videos]
        size = sum(len(str(message["content"])) for message in messages) + len(prefix)

        def encode() -> EncodedConversation:
            encoded = self.vidlada.processor.encode(messages, counts)
            encoded.append(self.vidlada.processor.answer_ids(prefix), encoded.turn[-1], answer=True)
            return encoded

        encoded = await self._encode(size, encode)
        return [self.checked(EngineRequest(encoded, videos, settings, max_tokens, choices, bool(prefix)))], seconds

    async def _encode(self, characters: int, encode: Callable[[], Result]) -> Result:
        """Tokenize in a thread; long texts do not hold up short ones."""
        return await in_thread(LONG_TEXT if characters > LONG_TEXT_CHARACTERS else TEXT, encode)

    def plain_text(self, text: str) -> EncodedConversation:
        """A text without a chat template."""
        encoded, processor = EncodedConversation(), self.vidlada.processor
        encoded.append([processor.token_id(BOS)], 0, control=True)
        encoded.append(processor.text_ids(text), 0)
        return encoded

    def checked(self, job: EngineRequest) -> EngineRequest:
        """A job that fits the model; 422 for one that does not."""
        most = self.vidlada.processor.max_length
        if job.tokens > most:
            slots, smaller = ("thought and answer", "think_length or ") if job.settings.think else ("answer", "")
            message = f"prompt and {slots} slots take {job.tokens} tokens, more than the model's {most}"
            instead = f"use fewer frames or a smaller {smaller}max_tokens"
            raise RequestError(422, f"{message}; {instead}", "context_length_exceeded")
        return job

    def sampling(
        self, frames: int | None, fps: float | None, force_sample: bool | None, background: str | None = None
    ) -> Sampling:
        """How to sample, within the limits; None stands for a default."""
        most = self.limits.max_frames
        if frames is None:
            frames = min(Sampling().most, most)
        if frames > most:
            raise RequestError(422, f"{frames} frames are more than the {most} allowed", "too_many_frames", "frames")
        default = Sampling()
        return Sampling(fps or default.fps, frames, bool(force_sample), background or default.background)

    def frames_that_fit(
        self, references: Sequence[MediaReference], settings: GenerationSettings, time_instruction: bool | None
    ) -> int:
        """Frames of `auto`, within the limits. Images count as many tokens as any can have: they are not read yet."""
        images = sum(reference.is_image for reference in references)
        largest = self.vidlada.processor.tiling.most_tokens(alone=images == 1)
        others = -(-images * largest // self.vidlada.processor.tokens_per_frame)
        videos = max(1, len(references) - images)
        prompt = PromptSettings(time_instruction=bool(time_instruction))
        most = self.vidlada.frames_that_fit([others] if others else [], videos, settings, prompt)
        return min(most, self.limits.max_frames)

    async def show(
        self, reference: MediaReference, sampling: Sampling, owner: str, seconds: dict[str, float], alone: bool = True
    ) -> MediaInput:
        """Sampled frames or tiles of a reference; decoded once, however many ask for them at the same time."""
        tiling = self.vidlada.processor.tiling
        if reference.is_image:
            sampling = Sampling(max_frames=1, background=sampling.background)
        started = time.perf_counter()
        async with self.media.open(reference.url, owner) as medium:
            fetched = time.perf_counter()
            seconds["fetch"] += fetched - started
            if reference.is_image and not tiling.as_frames:
                frames, shape = await self.decoders.tile(medium.path, tiling, alone)
                seconds["video"] += time.perf_counter() - fetched
                return MediaInput((medium.key, "image", alone), frames, shape)
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
