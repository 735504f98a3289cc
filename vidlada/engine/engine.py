"""One thread that owns the model: requests join between denoising steps, and leave within one.

What is special about it:
- in every turn the thread does at most one piece of preparation (a few frames through the vision tower, or one request
  joining) and one step of some running answers, so new requests never stop the running ones for long;
- the scheduler chooses: short answers do not wait for long ones, and long ones get their share;
- an answer is the same as alone: requests share steps, not settings, blocks or random numbers;
- vision features are kept, bounded, under a key made from the video's content; so are the frames' keys and values
  where a request's settings say `reuse`;
- an answer chosen from given ones is a request like any other, of one step;
- a cancelled request is gone before the next step;
- when memory runs out, what is only kept to save time is given up; then the youngest request waits again, to be decoded
  from its start when there is room, and the others repeat the step. Only a request that does not fit alone fails.

It knows nothing of HTTP. Whoever submits a job gets a handle, and reads updates from it in an asyncio event loop.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from vidlada.api import VidLaDA
from vidlada.decoding.cache import VisualCache
from vidlada.decoding.memory import is_out_of_memory, peak_bytes
from vidlada.decoding.sampler import Denoiser, State, Statistics
from vidlada.decoding.thinking import Turn
from vidlada.engine.choosing import ChoosingTurn
from vidlada.engine.feature_store import LRUCache
from vidlada.engine.forms import FormTurn
from vidlada.engine.limits import EngineLimits
from vidlada.engine.requests import (
    EngineClosedError,
    EngineRequest,
    MediaInput,
    MemoryExhaustedError,
    RequestHandle,
    Update,
)
from vidlada.engine.scheduler import Scheduler
from vidlada.errors import VidLaDAError
from vidlada.machine import MEBI, free_memory

FRAMES_PER_TURN = 8  # through the vision tower between two steps; always the same, so that features are too

Result = TypeVar("Result")

log = logging.getLogger("vidlada.engine")


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
    put_back: int = 0
    stepping_seconds: float = 0.0


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
        self.decoding: dict[int, RequestHandle] = {}  # by their numbers in the denoiser
        self.choosing: list[RequestHandle] = []  # to be answered in one step
        self.joining: dict[RequestHandle, Iterator[None]] = {}  # being prepared, in order of their places
        self.parts: dict[Hashable, list[Tensor]] = {}  # features of videos being encoded, shared by who waits for them
        self.scheduler = Scheduler(limits, partial(free_memory, vidlada.model.device))
        self.closing = False
        self.condition = threading.Condition()
        vidlada.processor.text_ids("")  # sets the tokenizer's mode, which must not change while threads share it
        self.thread = threading.Thread(target=self._run, name="vidlada-engine", daemon=True)
        self.thread.start()

    def submit(self, job: EngineRequest) -> RequestHandle:
        """Queue a job; to be called in the event loop that reads the handle."""
        handle = RequestHandle(job, asyncio.get_running_loop(), self.bytes_of(job))
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
    def running(self) -> list[RequestHandle]:
        """Requests that take steps."""
        return [*self.decoding.values(), *self.choosing]

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
            error = self._as_vidlada_error(cause)
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
            if self.running:
                self._step()

    def _drop_cancelled(self) -> None:
        gone = [handle for handle in [*self.running, *self.joining] if handle.cancelled]
        self._remove(gone)
        with self.condition:
            gone += [handle for handle in self.waiting if handle.cancelled]
            self.waiting = deque(handle for handle in self.waiting if not handle.cancelled)
        self.totals.cancelled += len(gone)
        for handle in gone:
            handle.put(VidLaDAError("the request was cancelled"))

    def _remove(self, gone: Collection[RequestHandle]) -> None:
        """Take requests out of whatever is done with them."""
        self.decoding = {number: handle for number, handle in self.decoding.items() if handle not in gone}
        self.choosing = [handle for handle in self.choosing if handle not in gone]
        self.denoiser.rows = [row for row in self.denoiser.rows if row.number in self.decoding]
        self.joining = {handle: pieces for handle, pieces in self.joining.items() if handle not in gone}

    def bytes_of(self, job: EngineRequest) -> int:
        """Memory a request takes: what it keeps between steps, and its part of a pass over everything."""
        model, visual = self.vidlada.model, sum(frame >= 0 for frame in job.encoded.frame_index)
        return peak_bytes(model.config.text, [(job.tokens, visual, job.settings)], model.dtype.itemsize)

    def _admit(self) -> None:
        """Give places to requests that wait, as long as there are some."""
        while True:
            with self.condition:
                waiting = {handle.task: handle for handle in self.waiting}
                taken = [handle.task for handle in [*self.running, *self.joining]]
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
        done = self._attempt(lambda: next(self.joining[handle], "done") == "done")
        if isinstance(done, VidLaDAError):
            self._recover(done, [handle], spoiled=[handle])
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
        if job.form:
            handle.turn = FormTurn(self.vidlada, request, job.form)
        elif job.choices:
            handle.turn = ChoosingTurn(self.vidlada, request, job.choices)
        else:
            handle.turn = Turn(request, self.vidlada.processor, model, job.max_tokens)
        if isinstance(handle.turn, ChoosingTurn | FormTurn) and handle.turn.choosing:
            self.choosing.append(handle)
        else:
            self._start(handle)

    def _start(self, handle: RequestHandle) -> None:
        """Let what is to be decoded now join."""
        assert handle.turn is not None
        number, state = self.denoiser.add(handle.turn.request)
        self.decoding[number] = handle
        if state is not None:
            self._deliver(number, state)

    def _step(self) -> None:
        """One step of the requests whose turn it is."""
        started = time.perf_counter()
        chosen = set(self.scheduler.turn(handle.task for handle in self.running))
        computed = self._choose([handle for handle in self.choosing if handle.task in chosen])
        computed += self._denoise({number for number, handle in self.decoding.items() if handle.task in chosen})
        self.totals.turns_with_steps += 1
        self.totals.stepping_seconds += time.perf_counter() - started
        self.scheduler.charge(computed)

    def _choose(self, handles: Iterable[RequestHandle]) -> float:
        """One pass of requests that have something to choose; gives the tokens computed."""
        computed = 0.0
        for handle in handles:
            turn = handle.turn
            assert isinstance(turn, ChoosingTurn | FormTurn)
            earlier, found = turn.statistics, self._attempt(turn.step)
            if isinstance(found, VidLaDAError):
                self._recover(found, [handle])
                break  # others may be gone too
            state, stable, scores = found
            computed += self._count(handle, state.statistics, earlier)
            if turn.choosing:
                continue
            self.choosing.remove(handle)
            if stable.finish_reason is None:  # the rest of the form is to be decoded
                handle.task.restart(handle.job.settings.gen_length)
                error = self._attempt(partial(self._start, handle))
                if error is not None:
                    self._recover(error, [handle], [handle])
                    break
                continue
            handle.turn = None
            self._finished()
            handle.put(Update(state, stable, dict(handle.seconds), state.confidence, scores))
        return computed

    def _denoise(self, numbers: set[int]) -> float:
        """One denoising step of some requests; gives the tokens computed."""
        rows = [row for row in self.denoiser.rows if row.number in numbers]
        others = [row for row in self.denoiser.rows if row.number not in numbers]
        if not rows:
            return 0.0
        before = {row.number: row.statistics for row in rows}
        self.denoiser.rows, self.denoiser.spoiled = rows, set()
        states = self._attempt(self.denoiser.step)
        self.denoiser.rows = [*self.denoiser.rows, *others]
        if isinstance(states, VidLaDAError):
            spoiled = [self.decoding[number] for number in self.denoiser.spoiled]
            self._recover(states, [self.decoding[number] for number in before], spoiled)
            return 0.0
        computed, failed = 0.0, list[tuple[VidLaDAError, RequestHandle]]()
        for number, state in states:
            handle = self.decoding[number]
            computed += self._count(handle, state.statistics, before[number])
            error = self._attempt(partial(self._deliver, number, state))
            if error is not None:
                failed.append((error, handle))
        for error, handle in failed:
            self._recover(error, [handle], [handle])
        return computed

    def _count(self, handle: RequestHandle, statistics: Statistics, earlier: Statistics) -> float:
        """Take note of a step of a request; gives the tokens it computed."""
        totals = self.totals
        totals.steps += 1
        totals.tokens += statistics.tokens - earlier.tokens
        for segment, count in statistics.refreshes.items():
            totals.refreshes[segment] += count - earlier.refreshes.get(segment, 0)
        mean = sum(statistics.layer_tokens) / max(1, len(statistics.layer_tokens))
        return handle.task.update(statistics.steps, statistics.tokens, mean)

    def _deliver(self, number: int, state: State) -> None:
        """Send a state on; free the place of an answer that is complete."""
        handle = self.decoding[number]
        turn = handle.turn
        assert isinstance(turn, Turn | FormTurn)
        request = turn.request
        if state.visual is not None:
            self.visual.put(handle.job.visual_key, state.visual, state.visual.nbytes)
        state, stable = turn.take(state)
        state = replace(state, visual=None)  # readers have no use for it
        if stable.finish_reason is not None or turn.request is not request:
            self.denoiser.remove(number)
            del self.decoding[number]
        if stable.finish_reason is not None:
            handle.turn = None
            self._finished()
        handle.put(Update(state, stable, dict(handle.seconds), handle.confidence_after(state)))
        if turn.request is not request:  # the thought is complete, and the answer has slots of its own
            handle.confidence = handle.committed = None
            handle.task.restart(handle.job.settings.gen_length)
            self._start(handle)

    def _finished(self) -> None:
        """Take note of a complete answer."""
        self.totals.finished += 1
        self.scheduler.finished()

    def _attempt(self, run: Callable[[], Result]) -> "Result | VidLaDAError":
        """What something returns, or the error it ends with, when the traceback, which keeps tensors alive, is gone."""
        try:
            return run()
        except Exception as error:
            return self._as_vidlada_error(error)

    def _recover(
        self, error: VidLaDAError, failed: Collection[RequestHandle], spoiled: Collection[RequestHandle] = ()
    ) -> None:
        """Deal with an error.

        Args:
            error: if it is not that memory ran out, the requests it happened to fail.
            failed: those requests.
            spoiled: those of them that cannot go on from where they were.
        """
        if not isinstance(error, MemoryExhaustedError):
            self._fail(error, failed)
            return
        taken = list(dict.fromkeys([*self.running, *self.joining, *failed]))
        released = self._release()
        if len(taken) == 1 and (not released or taken[0].retried):
            advice = "use fewer frames, a smaller gen_length or a smaller type"
            self._fail(MemoryExhaustedError(f"{error}, though nothing else was running; {advice}"), taken)
            return
        back = list(spoiled) or ([] if released else [max(taken, key=lambda handle: handle.submitted)])
        if not released:
            self.scheduler.exhausted([handle.task for handle in taken], [handle.task for handle in back])
        log.warning("%s; %d of %d requests are put back", error, len(back), len(taken))
        self._remove(back)
        self.totals.put_back += len(back)
        for handle in sorted(back, key=lambda handle: handle.submitted, reverse=True):
            handle.retried = len(taken) == 1
            handle.reset(self.bytes_of(handle.job))
            with self.condition:
                self.waiting.appendleft(handle)

    def _release(self) -> bool:
        """Free what is only kept to save time; says whether that was anything worth a second try."""
        kept = self.features.nbytes + self.visual.nbytes
        for store in (self.features, self.visual):
            store.clear()
        self.denoiser.clear_graphs()
        if self.vidlada.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return kept > 0

    def _fail(self, error: VidLaDAError, handles: Collection[RequestHandle]) -> None:
        """Tell requests that there will be no answer."""
        self._remove(handles)
        for handle in handles:
            self.totals.failed += 1
            handle.put(error)

    def _fail_all(self, error: VidLaDAError) -> None:
        """Tell every request that there will be no answer."""
        with self.condition:
            handles = [*self.running, *self.joining, *self.waiting]
            self.decoding.clear()
            self.choosing.clear()
            self.joining.clear()
            self.waiting.clear()
            self.denoiser.rows = []
        self._fail(error, handles)

    @staticmethod
    def _as_vidlada_error(error: Exception) -> VidLaDAError:
        if isinstance(error, VidLaDAError):
            return error
        lines = str(error).splitlines() or [""]
        if is_out_of_memory(error):
            return MemoryExhaustedError(f"the model ran out of memory: {lines[0].rstrip('.')}")
        log.exception("the model failed", exc_info=error)
        return VidLaDAError(f"the model failed: {type(error).__name__}: {lines[0]}")
