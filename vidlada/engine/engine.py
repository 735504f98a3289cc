"""One thread that owns the model: requests come from event loops, and their updates go back there.

What is special about it, beside what the core does (`core.py`):
- vision features are kept, bounded, under a key made from the video's content; so are the frames' keys and values
  where a request's settings say `reuse`;
- videos are encoded a few frames a turn, and those that several requests wait for only once.

It knows nothing of HTTP. Whoever submits a job gets a handle, and reads updates from it in an asyncio event loop.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from vidlada.decoding.cache import VisualCache
from vidlada.decoding.thinking import Turn
from vidlada.engine.choosing import ChoosingTurn
from vidlada.engine.core import EngineCore
from vidlada.engine.feature_store import LRUCache
from vidlada.engine.forms import FormTurn
from vidlada.engine.limits import EngineLimits
from vidlada.engine.prompts import build_request
from vidlada.engine.requests import EngineClosedError, EngineRequest, MediaInput, RequestHandle
from vidlada.errors import VidLaDAError
from vidlada.machine import MEBI
from vidlada.model.free_memory import free_memory_of
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.processor import VidLaDAProcessor

VISUAL_STORE_SHARE = 1 / 8  # of the memory that is free at the start
VISUAL_STORE_MB = 1024  # where that is not known
FRAMES_PER_TURN = 8  # through the vision tower between two steps; always the same, so that features are too

log = logging.getLogger("vidlada.engine")


class Engine(EngineCore):
    """The thread and its queue.

    Args:
        model: only this thread may run it from now on.
        processor: that fits it.
        limits: of what runs together, and of what is kept.
    """

    def __init__(self, model: VidLaDAForMaskedDiffusion, processor: VidLaDAProcessor, limits: EngineLimits):
        super().__init__(model, limits)
        self.processor = processor
        self.features: LRUCache[Tensor] = LRUCache(limits.feature_store_mb * MEBI)
        self.visual: LRUCache[VisualCache] = LRUCache(self._visual_store_bytes())
        self.warned = self.closing = False
        self.arrived: deque[RequestHandle] = deque()
        self.parts: dict[Hashable, list[Tensor]] = {}  # features of videos being encoded, shared by who waits for them
        self.condition = threading.Condition()
        processor.text_ids("")  # sets the tokenizer's mode, which must not change while threads share it
        self.thread = threading.Thread(target=self._run, name="vidlada-engine", daemon=True)
        self.thread.start()

    def _visual_store_bytes(self) -> int:
        """Most bytes of frames' keys and values to keep; each device holds those of its layers."""
        given = self.limits.visual_store_mb
        memory = free_memory_of(self.model.language_model)
        if given is not None or not memory:
            return (given or VISUAL_STORE_MB) * MEBI
        return int(VISUAL_STORE_SHARE * min(each.free / each.share for each in memory))

    def submit(self, job: EngineRequest) -> RequestHandle:
        """Queue a job; to be called in the event loop that reads the handle."""
        loop = asyncio.get_running_loop()
        handle = RequestHandle(job, self.model, loop, self._join, self._keep_visual, self.visual.max_bytes)
        if handle.settings.reuse < job.settings.reuse and not self.warned:
            self.warned = True
            most = -(-self.visual.max_bytes // MEBI)
            log.warning("reuse: the frames' keys and values take more than the %d MiB of visual_store_mb", most)
        with self.condition:
            if self.closing:
                raise EngineClosedError
            self.arrived.append(handle)
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
        return len(self.arrived) + len(self.waiting) + len(self.joining)

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()

    # --- the thread ---

    def _run(self) -> None:
        error: VidLaDAError = EngineClosedError()
        try:
            while self._receive():
                self.turn()
                if not self.joining:
                    self.parts.clear()  # of videos that nobody waits for any more
        except Exception as cause:  # a defect of the engine: nobody may wait for it
            error = self.error_of(cause)
        with self.condition:
            self.closing = True
            self.waiting.extend(self.arrived)
            self.arrived.clear()
        self._fail(error, [*self.running, *self.joining, *self.waiting])
        self.waiting.clear()

    def _receive(self) -> bool:
        """Take over what was submitted, waiting for it where there is nothing else to do; false at the end."""
        with self.condition:
            while not (self.closing or self.arrived or self.busy):
                self.condition.wait()
            self.waiting.extend(self.arrived)
            self.arrived.clear()
            return not self.closing

    @torch.inference_mode()
    def _encode(self, shown: MediaInput, first: int) -> Tensor:
        """Features of a few frames, pooled, or of a few tiles of an image: (pictures, cells, width)."""
        model = self.model
        pixels = self.processor.pixel_values(
            shown.frames.images[first : first + FRAMES_PER_TURN], model.device, model.dtype
        )
        self.totals.frames_encoded += len(pixels)
        projected = model.vision.project(pixels)
        return projected if shown.image is not None else model.vision.pool(projected)

    def _join(self, handle: RequestHandle) -> Iterator[None]:
        """Encode the videos that are not known yet, piece by piece, then let the request join."""
        model, visual, left = self.model, [], handle.task.frames
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
        known = self.visual.get(job.visual_key) if handle.settings.reuse else None
        request = build_request(model, self.processor, job.encoded, tokens, handle.settings)
        request = replace(request, visual=known)
        if job.form:
            handle.turn = FormTurn(model, self.processor, request, job.form)
        elif job.choices:
            handle.turn = ChoosingTurn(model, self.processor, request, job.choices)
        else:
            handle.turn = Turn(request, self.processor, model, job.max_tokens)

    def _keep_visual(self, job: EngineRequest, visual: VisualCache) -> None:
        """Keep what a further question about a video reuses."""
        self.visual.put(job.visual_key, visual, visual.nbytes)

    def release(self) -> bool:
        """Free what is only kept to save time; says whether that was anything worth a second try."""
        kept = self.features.nbytes + self.visual.nbytes
        for store in (self.features, self.visual):
            store.clear()
        super().release()
        return kept > 0

    def error_of(self, error: Exception) -> VidLaDAError:
        """An error that ends the requests it happened to; a defect goes to the log, and the others go on."""
        try:
            return super().error_of(error)
        except Exception:
            log.exception("the model failed")
            lines = str(error).splitlines() or [""]
            return VidLaDAError(f"the model failed: {type(error).__name__}: {lines[0]}")
