"""What an engine takes, questions, and the handle by which an event loop reads their updates."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from vidlada.decoding.cache import VisualCache
from vidlada.decoding.memory import merged_shape, reused_bytes
from vidlada.engine.entry import Entry, Update
from vidlada.engine.forms import Form
from vidlada.errors import VidLaDAError
from vidlada.generation import GenerationSettings
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.processor import EncodedConversation
from vidlada.tiling import ImageShape, MediaShape
from vidlada.video import Frames

MOST_PENDING = 64  # updates a slow reader may be behind; older ones are dropped, the last one never


class EngineClosedError(VidLaDAError):
    """The engine is closing, and the request with it."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


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
            self.settings.kv_dtype,
        )

    @property
    def tokens(self) -> int:
        """Prompt tokens, slots of a thought and answer slots."""
        return len(self.encoded.input_ids) + self.settings.slots


class RequestHandle(Entry):
    """A submitted job, seen from the event loop that submitted it.

    Args:
        job: what is asked.
        model: that answers.
        loop: that reads the updates.
        join: prepares the request, which it is given.
        keep: takes what a further question about the videos may reuse.
        most_kept: bytes that it can take; where there would be more, nothing is left for a further question.
    """

    def __init__(
        self,
        job: EngineRequest,
        model: VidLaDAForMaskedDiffusion,
        loop: asyncio.AbstractEventLoop,
        join: Callable[["RequestHandle"], Iterator[None]],
        keep: Callable[[EngineRequest, VisualCache], None],
        most_kept: int,
    ):
        self.job, self.loop, self.join, self.keep = job, loop, join, keep
        self.updated = self.seen = 0  # updates since it began, and the most before it had to begin again
        self.pending: deque[Update | VidLaDAError] = deque(maxlen=MOST_PENDING)
        self.arrived = asyncio.Event()
        visual = sum(frame >= 0 for frame in job.encoded.frame_index)
        frames = sum(len(shown.frames.times) for shown in job.videos)
        tokens, visual, settings = merged_shape(job.tokens, visual, job.settings)
        text, processes = model.config.text, model.language_model.processes
        if settings.reuse and reused_bytes(text, visual, settings, model.dtype.itemsize, processes) > most_kept:
            settings = settings.replace(reuse=0)  # the answer is the same, without a copy that nobody could keep
        super().__init__(settings, tokens, visual, model, frames, chooses=bool(job.choices))

    def prepare(self) -> Iterator[None]:
        """Encode the videos, piece by piece."""
        return self.join(self)

    def reset(self) -> None:
        """Be as before the first step; updates that were delivered are not repeated."""
        super().reset()
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
                    await self.arrived.wait()
                self.arrived.clear()
                while self.pending:
                    update = self.pending.popleft()
                    if isinstance(update, VidLaDAError):
                        raise update
                    yield update
                    if update.stable.finish_reason is not None:
                        return
                    await asyncio.sleep(0)  # a reader that never waits must not keep the loop from others
        finally:
            self.cancel()

    def put(self, update: "Update | VidLaDAError") -> None:
        """Called by the engine's thread. Updates that a request repeats after a `reset` are left out."""
        if isinstance(update, Update):
            if update.state.visual is not None:
                self.keep(self.job, update.state.visual)
                update = replace(update, state=replace(update.state, visual=None))  # readers have no use for it
            self.updated += 1
            if self.updated <= self.seen and update.stable.finish_reason is None:
                return

        def deliver() -> None:
            self.pending.append(update)
            self.arrived.set()

        try:
            self.loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.cancelled = True
