"""When memory runs out, the youngest request waits again, and only what does not fit alone fails."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from engines import alone, answer, engine_of, job_of, turns_of

from vidlada.decoding.cache import RequestCache
from vidlada.decoding.sampler import Denoiser
from vidlada.engine.limits import EngineLimits
from vidlada.engine.scheduler import Scheduler, Task
from vidlada.errors import VidLaDAError
from vidlada.model.vision import Vision
from vidlada.serve.completions import Reply

QUESTIONS = ["is it red ?", "which way does it move ?", "how many are large ?", "count", "describe the video ."]


def shortage(*rest):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")


@pytest.fixture
def room(monkeypatch):
    """Passes of more rows than this run out of memory, after part of their work."""
    room = {"rows": 2, "failures": 0}
    block_logits = Denoiser.block_logits

    def limited(self, rows, guided=False):
        if len(self.engine.decoding if hasattr(self, "engine") else rows) > room["rows"]:
            block_logits(self, rows[:1], guided)
            room["failures"] += 1
            shortage()
        return block_logits(self, rows, guided)

    monkeypatch.setattr(Denoiser, "block_logits", limited)
    return room


async def watched(engine, job):
    """The last update; text grows and no step comes twice."""
    updates = [update async for update in engine.submit(job).updates()]
    steps = [update.state.step for update in updates]
    assert steps == sorted(set(steps))
    texts = [update.stable.text for update in updates]
    assert all(later.startswith(text) for text, later in zip(texts, texts[1:], strict=False))
    return updates[-1]


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"cache": "none"}, {"cache": "dual"}, {"cache": "mars", "temperature": 0.7}, {"cache": "dllm"},
    {"cache": "interval", "threshold": 0.3}, {"cache": "none", "think": True, "think_length": 8},
])  # fmt: skip
def test_more_than_fit_are_answered_as_alone(small, room, options):
    async def run(engine):
        engine.denoiser.engine = engine
        return await asyncio.gather(
            *(
                watched(engine, job_of(small, text + "/think" * ("think" in options), number % 3, **options))
                for number, text in enumerate(QUESTIONS)
            )
        )

    with engine_of(small, max_running=8) as engine:
        updates = asyncio.run(run(engine))
        totals = engine.totals
    assert totals.preempted > 0 < room["failures"]
    assert (totals.finished, totals.failed) == (len(QUESTIONS), 0)
    room["rows"] = len(QUESTIONS)
    for number, (text, update) in enumerate(zip(QUESTIONS, updates, strict=True)):
        expected = alone(small, text, number % 3, **options)
        assert (update.stable.text, update.state.answer_ids()) == (expected.text, expected.token_ids)
        assert update.state.statistics.steps == expected.statistics.steps


def test_what_does_not_fit_alone_fails_in_a_line(small, room):
    async def run(engine):
        room["rows"] = 0
        with pytest.raises(VidLaDAError, match="ran out of memory.*nothing else was running; use fewer") as caught:
            await answer(engine, job_of(small, cache="dual"))
        assert "\n" not in str(caught.value)
        room["rows"] = 8
        return await answer(engine, job_of(small, cache="dual"))

    with engine_of(small) as engine:
        assert asyncio.run(run(engine)).stable.finish_reason
        assert (engine.totals.failed, engine.totals.finished) == (1, 1)


def test_what_is_kept_is_given_up_first(small, room):
    options, kept = {"cache": "frozen", "reuse": 2}, []

    async def run(engine):
        await answer(engine, job_of(small, frames=6, **options))
        kept.append(engine.visual.nbytes)
        recover, room["rows"] = engine._recover, 0

        def once(*arguments):
            recover(*arguments)
            kept.append(engine.visual.nbytes)
            room["rows"] = 8

        engine._recover = once
        return await answer(engine, job_of(small, "count", frames=5, **options))

    with engine_of(small) as engine:
        assert asyncio.run(run(engine)).stable.finish_reason
        assert kept[0] > 0 == kept[1]
        assert (engine.totals.failed, engine.totals.preempted) == (0, 0)


@pytest.mark.parametrize("others", [0, 1])
def test_the_vision_tower_runs_out_of_memory(small, monkeypatch, others):
    failures, forward = [], Vision.project

    def limited(self, *arguments, **named):
        if not failures:
            failures.append(1)
            shortage()
        return forward(self, *arguments, **named)

    monkeypatch.setattr(Vision, "project", limited)

    async def run(engine, turns):
        long = [engine.submit(job_of(small, gen_length=128, block_length=8)).updates() for _ in range(others)]
        for updates in long:
            await turns.until(anext(updates))
        job = job_of(small, frames=6)
        if not others:
            with pytest.raises(VidLaDAError, match="out of memory"):
                await turns.until(answer(engine, job))
        return await turns.until(answer(engine, job))

    with engine_of(small) as engine, turns_of(engine) as turns:
        last = asyncio.run(run(engine, turns))
        assert failures
        assert engine.totals.preempted == others
        assert engine.totals.failed == 1 - others
    assert last.state.answer_ids() == alone(small, "is it red ?", 6).token_ids


def test_admission_learns():
    scheduler = Scheduler(EngineLimits())
    tasks = [Task(100, 16, kept=8, working=2) for _ in range(4)]
    assert scheduler.fits(tasks[3], tasks[:3])
    scheduler.shrink_budget(tasks, tasks[3:])
    assert scheduler.fits(tasks[2], tasks[:2])
    assert not scheduler.fits(tasks[3], tasks[:3])
    assert not scheduler.fits(tasks[3], tasks[:3], 4)
    for _ in range(20):
        scheduler.grow_budget()
    assert not scheduler.fits(tasks[3], tasks[:3])  # so many have failed
    smaller = Task(100, 16, kept=6, working=2)
    assert scheduler.fits(smaller, tasks[:3])
    scheduler.shrink_budget(tasks, tasks)
    assert scheduler.fits(tasks[0], [])
    assert scheduler.fits(tasks[0], tasks[1:3])
    assert not scheduler.fits(tasks[0], tasks[1:])


def test_a_repeated_answer_that_differs_is_not_put_behind_what_was_sent():
    def update(text):
        return SimpleNamespace(stable=SimpleNamespace(text=text, finish_reason=None, reasoning=""))

    job = SimpleNamespace(continues=False)
    submitted = [SimpleNamespace(handle=SimpleNamespace(job=job))]
    reply = Reply(None, "tiny", SimpleNamespace(include_reasoning=False), submitted)
    assert [reply.delta(0, update(text))[1] for text in ("a", "a cat", "a cat sits")] == ["a", " cat", " sits"]
    with pytest.raises(VidLaDAError, match="differs from what was sent"):
        reply.delta(0, update("a dog"))


def test_what_is_too_large_to_be_kept_is_not_copied_and_said_once(small, caplog, monkeypatch):
    copies, export = [], RequestCache.export_visual
    monkeypatch.setattr(RequestCache, "export_visual", lambda self: copies.append(self) or export(self))

    async def run(engine):
        engine.visual.max_bytes = 10
        for question in ("count", "is it red ?"):
            await answer(engine, job_of(small, question, frames=3, cache="frozen", reuse=1))
        return engine.visual.nbytes

    with engine_of(small) as engine:
        assert asyncio.run(run(engine)) == 0
    assert not copies
    assert [record.message for record in caplog.records].count(
        "reuse: the frames' keys and values take more than the 1 MiB of visual_store_mb"
    ) == 1


def test_the_size_of_the_store_of_keys_and_values(small, monkeypatch):
    for free, given, expected in ((2**33, None, 2**30), (2**33, 5, 5 * 2**20), (None, None, 2**30)):
        monkeypatch.setattr("vidlada.model.free_memory.free_memory", lambda device, free=free: free)
        with engine_of(small, visual_store_mb=given) as engine:
            assert engine.visual.max_bytes == expected
