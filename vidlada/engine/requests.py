"""What an engine takes and reports: questions, updates, and the handle that connects a client with both."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidlada.decoding.sampler import State
from vidlada.decoding.streaming import StableText
from vidlada.decoding.thinking import Turn
from vidlada.engine.choosing import ChoosingTurn
from vidlada.engine.forms import Form, FormTurn
from vidlada.engine.scheduler import Task
from vidlada.errors import VidLaDAError
from vidlada.generation import GenerationSettings
from vidlada.processor import EncodedConversation
from vidlada.tiling import ImageShape, MediaShape
from vidlada.video import Frames

MOST_PENDING = 64  # updates a slow reader may be behind; older ones are dropped, the last one never


class EngineClosedError(VidLaDAError):
    """The engine is closing, and the request with it."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class MemoryExhaustedError(VidLaDAError):
    """A pass of the model ran out of memory."""


@dataclass(frozen=True)
class MediaInput:
    """A video or an image of a job.

    Attributes:
        key: of its content and of how it was sampled.
        frames: sampled at the model's size; of an image, its tiles.
        image: its shape, where it is tiled.
    """

    key: Hashable
    frames: Frames
    image: ImageShape | None = None

    @property
    def shape(self) -> MediaShape:
        """What the layout of its visual tokens depends on."""
        return len(self.frames.images) if self.image is None else self.image


@dataclass(frozen=True)
class EngineRequest:
    """A question.

    Attributes:
        encoded: the conversation.
        videos: what it shows, in order.
        settings: of decoding.
        max_tokens: most tokens of the answer; the answer's slots by default.
        choices: answer with the likeliest of these instead of decoding.
        form: answer by filling this in.
        continues: the prompt ends within what the assistant says.
    """

    encoded: EncodedConversation
    videos: Sequence[MediaInput]
    settings: GenerationSettings
    max_tokens: int | None = None
    choices: Sequence[str] = ()
    form: Form = ()
    continues: bool = False

    @property
    def visual_key(self) -> Hashable:
        """Under which the frames' keys and values may be taken over; the decoding loop checks that they fit."""
        return (
            *(shown.key for shown in self.videos),
            self.settings.cache,
            self.settings.reuse,
            self.settings.visual_keep,
        )

    @property
    def tokens(self) -> int:
        """Prompt tokens, slots of a thought and answer slots."""
        return len(self.encoded.input_ids) + self.settings.slots


@dataclass(frozen=True)
class Update:
    """What a step brought.

    Attributes:
        state: after the step.
        stable: the part of the answer that can no longer change; the last update's is the whole answer.
        seconds: waiting in the queue, and in the vision tower.
        confidence: (gen_length,) probability with which each final slot was committed; 1 where it was given.
        choices: log-probabilities of the job's choices among each other.
    """

    state: State
    stable: StableText
    seconds: dict[str, float]
    confidence: Tensor
    choices: tuple[float, ...] = ()


class RequestHandle:
    """A submitted job, seen from the event loop that submitted it.

    Args:
        job: what is asked.
        loop: that reads the updates.
        bytes: of memory that it takes at its peak.
    """

    def __init__(self, job: EngineRequest, loop: asyncio.AbstractEventLoop, bytes: int):
        self.job, self.loop = job, loop
        self.cancelled = False
        self.retried = False  # after it had run out of memory alone
        self.seconds: dict[str, float] = {}
        self.submitted = time.perf_counter()
        self.updated = self.seen = 0  # updates since it began, and the most before it had to begin again
        self.reset(bytes)
        self.pending: deque[Update | BaseException] = deque(maxlen=MOST_PENDING)
        self.news = asyncio.Event()

    def reset(self, bytes: int) -> None:
        """Be as before the first step, perhaps for a second time.

        Args:
            bytes: of memory that the request takes.
        """
        job, settings = self.job, self.job.settings
        pace = settings.block_length / min(settings.steps_per_block, settings.block_length)
        self.task = Task(
            tokens=job.tokens,
            slots=settings.slots,
            pace=settings.slots if job.choices else pace,  # choices take one step
            passes=2 if settings.cfg_scale > 0 else 1,
            frames=sum(len(shown.frames.times) for shown in job.videos),
            bytes=bytes,
        )
        self.turn: Turn | ChoosingTurn | FormTurn | None = None  # while it runs
        self.confidence: Tensor | None = None
        self.committed: Tensor | None = None
        self.updated, self.seen = 0, max(self.seen, self.updated)

    def cancel(self) -> None:
        """Give up; the place is free before the next step. Harmless once it is done."""
        self.cancelled = True

    async def updates(self, deadline: float | None = None) -> AsyncIterator[Update]:
        """Updates until the answer is complete.

        Args:
            deadline: time of the event loop's clock after which to give up.

        Raises:
            VidLaDAError: the request turned out not to fit, or the model failed.
            TimeoutError: the deadline has passed.
        """
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    await self.news.wait()
                self.news.clear()
                while self.pending:
                    update = self.pending.popleft()
                    if isinstance(update, BaseException):
                        raise update
                    yield update
                    if update.stable.finish_reason is not None:
                        return
                    await asyncio.sleep(0)  # a reader that never waits must not keep the loop from others
        finally:
            self.cancel()

    def confidence_after(self, state: State) -> Tensor:
        """Probability with which each final slot was committed; a state tells it of those of its step alone."""
        before = self.committed if self.committed is not None else torch.zeros_like(state.committed)
        known = self.confidence if self.confidence is not None else state.confidence
        self.confidence, self.committed = torch.where(before, known, state.confidence), state.committed
        return self.confidence

    def put(self, update: "Update | BaseException") -> None:
        """Called by the engine's thread. Updates that a request repeats after a `reset` are left out."""
        if isinstance(update, Update):
            self.updated += 1
            if self.updated <= self.seen and update.stable.finish_reason is None:
                return

        def deliver() -> None:
            self.pending.append(update)
            self.news.set()

        try:
            self.loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.cancelled = True
