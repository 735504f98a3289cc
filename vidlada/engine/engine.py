"""One thread that owns the model: requests join between denoising steps, and leave within one.

What is special about it:
- in every turn the thread does at most one piece of preparation (a few frames through the vision tower, or one request
  joining) and one step of some running answers, so new requests never stop the running ones for long;
- the scheduler chooses: short answers do not wait for long ones, and long ones get their share;
- an answer is the same as alone: requests share steps, not settings, blocks or random numbers;
- vision features are kept, bounded, under a key made from the video's content; so are the frames' keys and values
  where a request's settings say `reuse`;
- a cancelled request is gone before the next step.

It knows nothing of HTTP. Whoever submits a job gets a handle, and reads updates from it in an asyncio event loop.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vidlada.api import VidLaDA
from vidlada.decoding.cache import VisualCache
from vidlada.decoding.sampler import Denoiser, State
from vidlada.decoding.streaming import StableText
from vidlada.decoding.thinking import Turn
from vidlada.engine.choosing import choose
from vidlada.engine.feature_store import LRUCache
from vidlada.engine.limits import EngineLimits
from vidlada.engine.scheduler import Scheduler, Task
from vidlada.errors import VidLaDAError
from vidlada.generation import GenerationSettings
from vidlada.machine import MEBI
from vidlada.processor import EncodedConversation
from vidlada.tiling import ImageShape, MediaShape
from vidlada.video import Frames

FRAMES_PER_TURN = 8  # through the vision tower between two steps; always the same, so that features are too
MOST_PENDING = 64  # updates a slow reader may be behind; older ones are dropped, the last one never

log = logging.getLogger("vidlada.engine")


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
        continues: the prompt ends within what the assistant says.
    """

    encoded: EncodedConversation
    videos: Sequence[MediaInput]
    settings: GenerationSettings
    max_tokens: int | None = None
    choices: Sequence[str] = ()
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


@dataclass
class Totals:
    """What an engine has done since it started."""

    steps: int = 0
    turns_with_steps: int = 0
    tokens: int = 0
    refreshes: dict[str, int] = field(default_factory=lambda: {"text": 0, "visual": 0})
    frames_encoded: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    stepping_seconds: float = 0.0


class RequestHandle:
    """A submitted job, seen from the event loop that submitted it."""

    def __init__(self, job: EngineRequest, loop: asyncio.AbstractEventLoop):
        self.job, self.loop = job, loop
        settings = job.settings
        self.task = Task(
            tokens=job.tokens,
            slots=settings.slots,
            pace=settings.block_length / min(settings.steps_per_block, settings.block_length),
            passes=2 if settings.cfg_scale > 0 else 1,
            frames=sum(len(shown.frames.times) for shown in job.videos),
        )
        self.cancelled = False
        self.seconds: dict[str, float] = {}
        self.submitted = time.perf_counter()
        self.turn: Turn | None = None  # while it runs
        self.confidence: Tensor | None = None
        self.committed: Tensor | None = None
        self.pending: deque[Update | BaseException] = deque(maxlen=MOST_PENDING)
        self.news = asyncio.Event()

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
        """Called by the engine's thread."""

        def deliver() -> None:
            self.pending.append(update)
            self.news.set()

        try:
            self.loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.cancelled = True


class Engine:
    """The thread and its queue.

    Args:
        vidlada: the model; only this thread may run it from now on.
        limits: of what runs together, and of what is kept.
    """

    def __init__(self, vidlada: VidLaDA, limits: EngineLimits):
        self.vidlada, self.limits = vidlada, limits
        self.denoiser = Denoiser(vidlada.model)
        self.features: LRUCache[Tensor] = LRUCache(limits.feature_store_mb * MEBI)
        self.visual: LRUCache[VisualCache] = LRUCache(limits.visual_store_mb * MEBI)
        self.totals = Totals()
        self.waiting: deque[RequestHandle] = deque()
        self.running: dict[int, RequestHandle] = {}
        self.joining: dict[RequestHandle, Iterator[None]] = {}  # being prepared, in order of their places
        self.parts: dict[Hashable, list[Tensor]] = {}  # features of videos being encoded, shared by who waits for them
        self.scheduler = Scheduler(limits)
        self.closing = False
        self.condition = threading.Condition()
        vidlada.processor.text_ids("")  # sets the tokenizer's mode, which must not change while threads share it
        self.thread = threading.Thread(target=self._run, name="vidlada-engine", daemon=True)
        self.thread.start()

    def submit(self, job: EngineRequest) -> RequestHandle:
        """Queue a job; to be called in the event loop that reads the handle."""
        handle = RequestHandle(job, asyncio.get_running_loop())
        with self.condition:
            if self.closing:
                raise EngineClosedError
            self.waiting.append(handle)
            self.condition.notify()
        return handle

    def stop(self) -> None:
        """Let the thread end after the step it is in; what is not finished fails with a `EngineClosedError`."""
        with self.condition:
            self.closing = True
            self.condition.notify()

    def close(self) -> None:
        """Stop, and wait for the thread to end."""
        self.stop()
        self.thread.join()

    @property
    def queued(self) -> int:
        """Requests that wait or are being prepared."""
        return len(self.waiting) + len(self.joining)

    @property
    def alive(self) -> bool:
        """The thread runs."""
        return self.thread.is_alive()

    # --- the thread ---

    def _run(self) -> None:
        error: VidLaDAError = EngineClosedError()
        try:
            self._serve()
        except Exception as cause:  # a defect of the engine: nobody may wait for it
            error = self._explained(cause)
            self.closing = True
        self._fail_all(error)

    def _serve(self) -> None:
        while True:
            with self.condition:
                while not (self.closing or self.waiting or self.joining or self.running):
                    self.condition.wait()
                if self.closing:
                    break
            self._drop_cancelled()
            self._prepare()
            if self.denoiser.rows:
                self._step()

    def _drop_cancelled(self) -> None:
        gone = [handle for handle in [*self.running.values(), *self.joining] if handle.cancelled]
        self.running = {number: handle for number, handle in self.running.items() if not handle.cancelled}
        self.denoiser.rows = [row for row in self.denoiser.rows if row.number in self.running]
        self.joining = {handle: pieces for handle, pieces in self.joining.items() if not handle.cancelled}
        with self.condition:
            gone += [handle for handle in self.waiting if handle.cancelled]
            self.waiting = deque(handle for handle in self.waiting if not handle.cancelled)
        self.totals.cancelled += len(gone)
        for handle in gone:
            handle.put(VidLaDAError("the request was cancelled"))

    def _admit(self) -> None:
        """Give places to requests that wait, as long as there are some."""
        while True:
            with self.condition:
                waiting = {handle.task: handle for handle in self.waiting}
                taken = [handle.task for handle in [*self.running.values(), *self.joining]]
                task = self.scheduler.admit(list(waiting), taken)
                if task is None:
                    return
                handle = waiting[task]
                self.waiting.remove(handle)
            handle.seconds["queue"] = time.perf_counter() - handle.submitted
            self.joining[handle] = self._join(handle)

    def _prepare(self) -> None:
        """One piece of preparation of one request that has a place."""
        self._admit()
        if not self.joining:
            self.parts.clear()  # of videos that nobody waits for any more
            return
        tasks = {handle.task: handle for handle in self.joining}
        handle = tasks[self.scheduler.prepare(list(tasks))]
        started = time.perf_counter()
        try:
            done = next(self.joining[handle], "done") == "done"
        except Exception as error:
            del self.joining[handle]
            self.totals.failed += 1
            handle.put(self._explained(error))
            return
        handle.seconds["vision"] = handle.seconds.get("vision", 0.0) + time.perf_counter() - started
        if done:
            del self.joining[handle]

    @torch.inference_mode()
    def _encode(self, shown: MediaInput, first: int) -> Tensor:
        """Features of a few frames, pooled, or of a few tiles of an image: (pictures, cells, width)."""
        model = self.vidlada.model
        pixels = self.vidlada.processor.pixel_values(
            shown.frames.images[first : first + FRAMES_PER_TURN], model.device, model.dtype
        )
        self.totals.frames_encoded += len(pixels)
        projected = model.vision.project(pixels)
        return projected if shown.image is not None else model.vision.pool(projected)

    def _join(self, handle: RequestHandle) -> Iterator[None]:
        """Encode the videos that are not known yet, piece by piece, then let the request join."""
        model, visual, left = self.vidlada.model, [], handle.task.frames
        for shown in handle.job.videos:
            images = shown.frames.images
            left -= len(images)
            features = self.features.get(shown.key)
            if features is None:
                parts = self.parts.setdefault(shown.key, [])
                while (first := FRAMES_PER_TURN * len(parts)) < len(images):
                    handle.task.frames = left + len(images) - first
                    parts.append(self._encode(shown, first))
                    yield
                with torch.inference_mode():
                    pooled = torch.cat(parts)
                    features = (
                        model.vision.with_newlines(pooled)
                        if shown.image is None
                        else model.vision.lay_out_image(pooled, shown.image)
                    )
                self.features.put(shown.key, features, features.nbytes)
                self.parts.pop(shown.key, None)
            visual.append(features)
        width = model.language_model.config.hidden_size
        tokens = torch.cat(visual) if visual else torch.empty(0, width, device=model.device)
        job = handle.job
        known = self.visual.get(job.visual_key) if job.settings.reuse else None
        request = replace(self.vidlada.request(job.encoded, tokens, job.settings), visual=known)
        if job.choices:
            self.totals.finished += 1
            chosen, stable, scores = choose(self.vidlada, request, job.choices)
            handle.put(Update(chosen, stable, dict(handle.seconds), chosen.confidence, scores))
            return
        handle.turn = Turn(request, self.vidlada.processor, model, job.max_tokens)
        self._start(handle)

    def _start(self, handle: RequestHandle) -> None:
        """Let what is to be decoded now join."""
        assert handle.turn is not None
        number, state = self.denoiser.add(handle.turn.request)
        self.running[number] = handle
        if state is not None:
            self._deliver(number, state)

    def _step(self) -> None:
        """One step of the requests whose turn it is."""
        started = time.perf_counter()
        chosen = set(self.scheduler.turn(self.running[row.number].task for row in self.denoiser.rows))
        others = [row for row in self.denoiser.rows if self.running[row.number].task not in chosen]
        rows = [row for row in self.denoiser.rows if self.running[row.number].task in chosen]
        before = {row.number: row.statistics for row in rows}
        self.denoiser.rows = rows
        try:
            states = self.denoiser.step()
        except Exception as error:
            self.denoiser.rows = others
            self._fail(self._explained(error), [self.running.pop(number) for number in before])
            return
        self.denoiser.rows += others
        totals, computed = self.totals, 0.0
        totals.turns_with_steps += 1
        totals.stepping_seconds += time.perf_counter() - started
        for number, state in states:
            statistics, earlier = state.statistics, before[number]
            totals.steps += 1
            totals.tokens += statistics.tokens - earlier.tokens
            for segment, count in statistics.refreshes.items():
                totals.refreshes[segment] += count - earlier.refreshes.get(segment, 0)
            mean = sum(statistics.layer_tokens) / max(1, len(statistics.layer_tokens))
            computed += self.running[number].task.update(statistics.steps, statistics.tokens, mean)
            self._deliver(number, state)
        self.scheduler.charge(computed)

    def _deliver(self, number: int, state: State) -> None:
        """Send a state on; free the place of an answer that is complete."""
        handle = self.running[number]
        turn = handle.turn
        assert turn is not None
        request = turn.request
        if state.visual is not None:
            self.visual.put(handle.job.visual_key, state.visual, state.visual.nbytes)
        state, stable = turn.take(state)
        state = replace(state, visual=None)  # readers have no use for it
        if stable.finish_reason is not None or turn.request is not request:
            self.denoiser.remove(number)
            del self.running[number]
        if stable.finish_reason is not None:
            handle.turn = None
            self.totals.finished += 1
        handle.put(Update(state, stable, dict(handle.seconds), handle.confidence_after(state)))
        if turn.request is not request:  # the thought is complete, and the answer has slots of its own
            handle.confidence = handle.committed = None
            handle.task.restart(handle.job.settings.gen_length)
            self._start(handle)

    def _fail(self, error: VidLaDAError, handles: Iterable[RequestHandle]) -> None:
        """Tell requests that there will be no answer."""
        for handle in handles:
            self.totals.failed += 1
            handle.put(error)

    def _fail_all(self, error: VidLaDAError) -> None:
        """Tell every request that there will be no answer."""
        with self.condition:
            handles = [*self.running.values(), *self.joining, *self.waiting]
            self.running.clear()
            self.joining.clear()
            self.waiting.clear()
            self.denoiser.rows = []
        self._fail(error, handles)

    @staticmethod
    def _explained(error: Exception) -> VidLaDAError:
        if isinstance(error, VidLaDAError):
            return error
        log.exception("the model failed", exc_info=error)
        lines = str(error).splitlines() or [""]
        return VidLaDAError(f"the model failed: {type(error).__name__}: {lines[0]}")
