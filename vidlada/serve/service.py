"""From a client's request to a handle of the engine: fetch, decode, encode the text, queue."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from vidlada.api import VidLaDA
from vidlada.decoding.choices import check_choices
from vidlada.decoding.request import Statistics
from vidlada.engine.engine import Engine
from vidlada.engine.forms import Form, form_slots
from vidlada.engine.requests import EngineRequest, RequestHandle
from vidlada.generation import GenerationSettings, PromptSettings
from vidlada.messages import BOS, time_instruction, with_think_mode
from vidlada.processor import EncodedConversation
from vidlada.serve.body import Arrivals
from vidlada.serve.conversation import conversation_of, generation_settings, with_seed
from vidlada.serve.decoder import Decoders
from vidlada.serve.errors import RequestError
from vidlada.serve.files import FileStore
from vidlada.serve.json_schema import form_of
from vidlada.serve.limits import Limits
from vidlada.serve.loading import LoadedMedia, MediaLoader
from vidlada.serve.media import MediaReference, MediaSource
from vidlada.serve.refusals import unsupported_error
from vidlada.serve.schema import AnswerRequest, ChatRequest
from vidlada.serve.threads import LONG_TEXT, TEXT, in_thread
from vidlada.tiling import MediaShape
from vidlada.video import Sampling

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

    def prompt_tokens(self, statistics: Statistics) -> int:
        """Tokens of the prompt as the model saw it, visual ones included.

        Args:
            statistics: of the answer.
        """
        return len(self.handle.job.encoded.input_ids) - statistics.merged


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
        self.engine = Engine(vidlada.model, vidlada.processor, limits)
        self.decoders = Decoders(limits, vidlada.processor.image_size, vidlada.processor.most_frames)
        self.files = FileStore(folder, limits)
        self.media = MediaSource(folder, limits, self.files, allowed, private_urls)
        self.loader = MediaLoader(self.media, self.decoders, vidlada.processor.tiling, limits)
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
        choices: tuple[str, ...] = tuple(request.guided_choice or ())
        form: Form = ()
        if request.guided_json is not None:
            form, _ = form_of(request.guided_json)
            settings = self._form_settings(settings, form)
        if not isinstance(request, ChatRequest):
            prompts = request.prompts
            texts = await self._encode(sum(map(len, prompts)), lambda: [self.plain_text(prompt) for prompt in prompts])
            jobs = [EngineRequest(each, [], settings, max_tokens, choices, form, continues=True) for each in texts]
            return [self.check_length(job) for job in jobs], LoadedMedia().seconds
        conversation = conversation_of(request.messages, self.vidlada.model.config.multi_turn)
        prefix = conversation.prefix
        if request.continue_final_message and not prefix:
            message = "there is nothing to continue: the last message is not the assistant's"
            raise RequestError(422, message, "bad_messages", "continue_final_message")
        media = await self._load(request, conversation.media, settings, owner)
        messages = conversation.messages(self._times(media) if request.time_instruction else "")
        messages = with_think_mode(messages, settings.think)
        if prefix:  # the answer has begun: it is too late for a thought
            settings = replace(settings, think=None)
        size = sum(len(str(message["content"])) for message in messages) + len(prefix)

        def encode() -> EncodedConversation:
            encoded = self.vidlada.processor.encode(messages, [shown.shape for shown in media.inputs])
            encoded.append(self.vidlada.processor.answer_ids(prefix), encoded.turn[-1], answer=True)
            return encoded

        encoded = await self._encode(size, encode)
        job = EngineRequest(encoded, media.inputs, settings, max_tokens, choices, form, continues=bool(prefix))
        return [self.check_length(job)], media.seconds

    async def _load(
        self, request: ChatRequest, references: Sequence[MediaReference], settings: GenerationSettings, owner: str
    ) -> LoadedMedia:
        """Everything that a conversation shows, unless it is too much."""
        config = self.vidlada.model.config
        if len(references) > self.limits.max_media:
            message = f"{len(references)} videos and images are more than the {self.limits.max_media} allowed"
            raise RequestError(422, message, "too_many_media", "messages")
        if references and config.text_only:
            raise RequestError(422, "this model is text-only; it cannot see videos", "text_only", "messages")
        most = self.vidlada.processor.max_length
        if len(references) * config.tokens_per_frame() > most:  # before any is fetched
            message = f"{len(references)} videos and images cannot fit into the model's {most} tokens"
            raise RequestError(422, message, "context_length_exceeded", "messages")
        if request.frames != "auto":
            self.sampling(request.frames, request.fps, request.force_sample)  # refuses before any is fetched, too
        prompt = PromptSettings(time_instruction=bool(request.time_instruction))

        def sampling_for(images: Sequence[MediaShape], videos: int) -> Sampling:
            frames = request.frames
            if frames == "auto":
                frames = min(self.vidlada.frames_that_fit(images, videos, settings, prompt), self.limits.max_frames)
            return self.sampling(frames, request.fps, request.force_sample, request.background)

        background = request.background or Sampling().background
        return await self.loader.load(references, owner, background, sampling_for)

    def _times(self, media: LoadedMedia) -> str:
        """The sentence that tells when the frames of a conversation's only video were taken."""
        videos = [shown for number, shown in enumerate(media.inputs) if number not in media.images]
        if len(videos) != 1:
            message = f"time_instruction needs exactly one video, not {len(videos)}"
            raise RequestError(422, message, "bad_time_instruction", "time_instruction")
        frames = videos[0].frames
        return time_instruction(frames.times, frames.info.duration)

    async def _encode(self, characters: int, encode: Callable[[], Result]) -> Result:
        """Tokenize in a thread; long texts do not hold up short ones."""
        return await in_thread(LONG_TEXT if characters > LONG_TEXT_CHARACTERS else TEXT, encode)

    def _form_settings(self, settings: GenerationSettings, form: Form) -> GenerationSettings:
        """Settings with as many slots as a form needs, in one block."""
        if settings.suffix:
            raise unsupported_error("suffix", "nothing can follow an answer that response_format describes")
        if not form:
            return settings
        slots = form_slots(form, self.vidlada.processor.text_ids)
        if slots > self.limits.max_tokens:
            message = f"the form of response_format takes {slots} slots, more than the {self.limits.max_tokens} allowed"
            raise RequestError(422, message, "too_many_tokens", "response_format")
        return replace(settings, gen_length=slots, block_length=slots, steps=None, think=None)

    def plain_text(self, text: str) -> EncodedConversation:
        """A text without a chat template."""
        encoded, processor = EncodedConversation(), self.vidlada.processor
        encoded.append([processor.token_id(BOS)], 0, control=True)
        encoded.append(processor.text_ids(text), 0)
        return encoded

    def check_length(self, job: EngineRequest) -> EngineRequest:
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
