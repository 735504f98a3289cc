"""Engines and jobs for tests."""

import asyncio
import threading
from contextlib import contextmanager

import numpy as np

from vidlada.engine.engine import Engine
from vidlada.engine.requests import EngineRequest, MediaInput
from vidlada.serve.limits import Limits
from vidlada.video import Frames, VideoInfo

INFO = VideoInfo("", 20, 1.0, 20.0, 36, 36, "raw")


def frames_of(number, seed=0):
    images = np.random.default_rng(seed).integers(0, 255, (number, 36, 36, 3), np.uint8)
    return Frames(images, tuple(map(float, range(number))), tuple(range(number)), INFO)


@contextmanager
def engine_of(model, **limits):
    engine = Engine(model.model, model.processor, Limits(**limits))
    try:
        yield engine
    finally:
        engine.close()


class Turns:
    """Lets an engine take turns only as the test says, however busy the machine is."""

    def __init__(self, engine):
        self.allowed, self.asked, turn = threading.Semaphore(0), threading.Event(), engine.turn

        def wait_and_turn():
            self.asked.set()
            self.allowed.acquire()
            turn()

        engine.turn = wait_and_turn

    async def until(self, awaitable, watch=lambda: None):
        """Turn by turn until something has come; calls `watch` before each."""
        task = asyncio.ensure_future(awaitable)
        while not task.done():
            if self.asked.is_set():  # never a turn ahead, on a slow machine either
                watch()
                self.asked.clear()
                self.allowed.release()
            await asyncio.sleep(0.005)
        return await task

    def open(self):
        """Turns are free from now on."""
        self.allowed.release(1_000_000)


@contextmanager
def turns_of(engine):
    turns = Turns(engine)
    try:
        yield turns
    finally:
        turns.open()


def job_of(model, question="is it red ?", frames=0, seed=0, max_tokens=None, **generation):
    generation.setdefault("gen_length", 16)
    shown = [MediaInput(("video", seed, frames), frames_of(frames, seed))] if frames else []
    content = [{"type": "video"}, {"type": "text", "text": question}] if frames else question
    encoded = model.processor.encode([{"role": "user", "content": content}], [frames] if frames else [])
    return EngineRequest(encoded, shown, model.settings(**generation), max_tokens)


async def answer(engine, job):
    updates = [update async for update in engine.submit(job).updates()]
    texts = [update.stable.text for update in updates]
    assert all(later.startswith(text) for text, later in zip(texts, texts[1:], strict=False))
    return updates[-1]


def alone(model, question, frames=0, seed=0, **generation):
    generation.setdefault("gen_length", 16)
    video = frames_of(frames, seed) if frames else None
    return model.ask(video, question, **generation)
