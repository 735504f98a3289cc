"""The engine: answers as alone, joining and leaving between steps, places freed at once."""

import asyncio
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import INFO, alone, answer, engine_of, frames_of, job_of, turns_of
from processes import wait_for

from vidlada.decoding.sampler import Denoiser
from vidlada.engine.feature_store import LRUCache
from vidlada.engine.requests import EngineRequest, MediaInput
from vidlada.errors import InputError, VidLaDAError
from vidlada.tiling import Tiling
from vidlada.video import Frames

CASES = [
    {"question": "is it red ?", "frames": 20},
    {"question": "which way does it move ?", "frames": 3, "seed": 1, "threshold": 0.3},
    {"question": "count", "gen_length": 32},
    {"question": "is it red ?", "frames": 20, "temperature": 0.7, "seed": 0},
    {"question": "how many are large ?", "frames": 5, "cache": "dual"},
    {"question": "how many are large ?", "frames": 5, "cache": "mars:window=1,anchors=4"},
    {"question": "is it red ?", "frames": 2, "cfg_scale": 1.0},
]


def test_together_as_alone(small):
    async def together(engine):
        return await asyncio.gather(*(answer(engine, job_of(small, **case)) for case in CASES))

    with engine_of(small, max_running=4) as engine:
        updates = asyncio.run(together(engine))
    for case, update in zip(CASES, updates, strict=True):
        expected = alone(small, **case)
        assert update.stable.text == expected.text
        assert update.state.answer_ids() == expected.token_ids
        assert update.stable.finish_reason == expected.finish_reason


def test_a_request_joins_and_another_leaves(small):
    async def run(engine):
        long = engine.submit(job_of(small, gen_length=64, block_length=8))
        steps = []
        async for update in long.updates():
            steps.append(update.state.step)
            if len(steps) == 2:
                short = await answer(engine, job_of(small, gen_length=4, block_length=4))
                assert short.stable.finish_reason
                assert not long.pending or not isinstance(long.pending[-1], BaseException)
        return steps

    with engine_of(small) as engine:
        assert asyncio.run(run(engine))[-1] > 4
        assert engine.totals.finished == 2


def test_cancelled_requests_free_their_place_within_a_step(small):
    async def run(engine, turns):
        updates = engine.submit(job_of(small, gen_length=256, block_length=8)).updates()
        await turns.until(anext(updates))
        waiting = engine.submit(job_of(small, gen_length=4, block_length=4))
        await updates.aclose()
        turns.open()
        last = [update async for update in waiting.updates()][-1]
        assert last.stable.finish_reason

    with engine_of(small, max_running=1) as engine, turns_of(engine) as turns:
        asyncio.run(run(engine, turns))
        assert engine.totals.cancelled == 1
        assert engine.totals.steps < 256
        assert not engine.running
        assert not engine.denoiser.rows


def test_cancelled_while_waiting(small):
    async def run(engine):
        updates = engine.submit(job_of(small, gen_length=64, block_length=8)).updates()
        await anext(updates)
        waiting = engine.submit(job_of(small))
        waiting.cancel()
        async for _ in updates:
            pass
        with pytest.raises(VidLaDAError, match="cancelled"):
            async for _ in waiting.updates():
                pass

    with engine_of(small, max_running=1) as engine:
        asyncio.run(run(engine))
        assert (engine.totals.cancelled, engine.totals.finished) == (1, 1)


def test_videos_are_encoded_once(small):
    async def run(engine):
        first = await answer(engine, job_of(small, frames=20))
        again = await answer(engine, job_of(small, frames=20))
        assert first.stable == again.stable
        return await asyncio.gather(*(answer(engine, job_of(small, frames=9, seed=5)) for _ in range(4)))

    with engine_of(small) as engine:
        asyncio.run(run(engine))
        assert engine.totals.frames_encoded == 29


def test_keys_and_values_are_taken_over_where_asked(small):
    async def run(engine):
        await answer(engine, job_of(small, frames=20, cache="frozen", reuse=2))
        return await answer(engine, job_of(small, question="how many ?", frames=20, cache="frozen", reuse=2))

    with engine_of(small) as engine:
        last = asyncio.run(run(engine))
        assert last.state.statistics.refreshes["visual"] == 0
        assert last.state.visual is None
        assert engine.visual.nbytes > 0


def test_token_bound_lets_only_one_run(small):
    running = []

    async def run(engine, turns):
        answers = asyncio.gather(*(answer(engine, job_of(small)) for _ in range(3)))
        await turns.until(answers, lambda: running.append(len(engine.running)))

    with engine_of(small, max_running_tokens=30) as engine, turns_of(engine) as turns:
        asyncio.run(run(engine, turns))
    assert max(running) == 1


def test_max_tokens_ends_early(small):
    with engine_of(small) as engine:
        last = asyncio.run(answer(engine, job_of(small, max_tokens=3, block_length=4)))
    assert last.stable.tokens <= 3
    assert last.state.step < 16


def test_what_does_not_fit_fails_alone(small):
    async def run(engine):
        good = asyncio.ensure_future(answer(engine, job_of(small, frames=20)))
        with pytest.raises(InputError, match="anchors"):
            await answer(engine, job_of(small, frames=1, cache="mars:window=0,anchors=999"))
        return await good

    with engine_of(small) as engine:
        assert asyncio.run(run(engine)).stable.finish_reason
        assert engine.totals.failed == 1


def test_a_failing_model_fails_its_requests_and_no_more(small, monkeypatch, caplog):
    async def run(engine):
        step = engine.denoiser.step
        monkeypatch.setattr(engine.denoiser, "step", lambda: 1 / 0)
        with pytest.raises(VidLaDAError, match="ZeroDivisionError"):
            await answer(engine, job_of(small))
        monkeypatch.setattr(engine.denoiser, "step", step)
        return await answer(engine, job_of(small))

    with engine_of(small) as engine:
        assert asyncio.run(run(engine)).stable.finish_reason
        assert engine.alive


def test_predictions_that_are_not_numbers_fail_their_request_alone(small, monkeypatch):
    block_logits = Denoiser.block_logits

    def spoilt(self, rows, guided=False):
        parts = self.split(rows, block_logits(self, rows, guided))
        return torch.cat(
            [part * (math.nan if row.settings.gen_length == 16 else 1) for row, part in zip(rows, parts, strict=True)]
        )

    async def run(engine):
        good = asyncio.ensure_future(answer(engine, job_of(small, gen_length=32)))
        with pytest.raises(VidLaDAError, match=r"predictions are not numbers \(NaN\)"):
            await answer(engine, job_of(small, gen_length=16))
        return await good

    monkeypatch.setattr(Denoiser, "block_logits", spoilt)
    with engine_of(small) as engine:
        assert asyncio.run(run(engine)).stable.text == alone(small, "is it red ?", gen_length=32).text
        assert (engine.totals.finished, engine.totals.failed) == (1, 1)


def test_deadline(small):
    async def run(engine):
        handle = engine.submit(job_of(small, gen_length=256, block_length=8))
        with pytest.raises(TimeoutError):
            async for _ in handle.updates(asyncio.get_running_loop().time()):
                pass

    with engine_of(small) as engine:
        asyncio.run(run(engine))
        wait_for(lambda: not (engine.running or engine.queued))


def test_closing_fails_what_runs(small):
    async def run(engine, turns):
        updates = engine.submit(job_of(small, gen_length=256, block_length=8)).updates()
        await turns.until(anext(updates))
        waiting = engine.submit(job_of(small))
        engine.stop()
        turns.open()
        await asyncio.to_thread(engine.close)
        with pytest.raises(VidLaDAError, match="shutting down"):
            async for _ in waiting.updates():
                pass
        with pytest.raises(VidLaDAError, match="shutting down"):
            engine.submit(job_of(small))

    with engine_of(small, max_running=1) as engine, turns_of(engine) as turns:
        asyncio.run(run(engine, turns))
        assert not engine.alive


def test_slow_readers_miss_drafts_but_not_the_end(small):
    async def run(engine):
        handle = engine.submit(replace(job_of(small, gen_length=128, block_length=8), max_tokens=None))
        while engine.running or engine.queued:
            await asyncio.sleep(0.01)
        return [update async for update in handle.updates()]

    with engine_of(small) as engine:
        updates = asyncio.run(run(engine))
    assert len(updates) < 128  # there was one a step
    assert updates[-1].stable.finish_reason


def test_bounded_store():
    store = LRUCache(10)
    store.put("a", 1, 4)
    store.put("b", 2, 4)
    assert store.get("a") == 1
    store.put("c", 3, 4)
    assert store.get("b") is None
    assert (store.get("a"), store.get("c"), store.nbytes) == (1, 3, 8)
    store.put("a", 4, 2)
    store.put("huge", 5, 11)
    assert (store.get("a"), store.get("huge"), store.nbytes) == (4, None, 6)


def test_a_thought_precedes_its_answer(small):
    thinks = {"think": True, "think_length": 16, "gen_length": 8}
    with engine_of(small) as engine:
        update = asyncio.run(answer(engine, job_of(small, "is it red ?/think", frames=3, **thinks)))
    expected = small.ask(frames_of(3), "is it red ?", **thinks)
    assert (update.stable.text, update.stable.reasoning) == (expected.text, expected.reasoning)
    assert update.state.statistics.steps == expected.statistics.steps > 8
    assert update.stable.reasoning_tokens > 0


CHOICES = ("red", "a blue square", "it moves left")


def choice_of(model, question="is it red ?", choices=CHOICES, **options):
    return replace(job_of(model, question, **options), choices=choices)


def test_a_choice_is_that_of_ask(small):
    with engine_of(small) as engine:
        update = asyncio.run(answer(engine, choice_of(small, frames=3, gen_length=8)))
    expected = small.ask(frames_of(3), "is it red ?", choices=CHOICES, gen_length=8)
    assert (update.stable.text, update.stable.finish_reason) == (expected.text, "stop")
    chances = dict(zip(CHOICES, np.exp(update.choices), strict=True))
    assert chances == pytest.approx(expected.choices, abs=1e-4)


def test_choices_count_as_requests_of_one_step(small):
    """They take a place, are charged for what they compute, and are counted."""
    running = []

    async def run(engine):
        charge = engine.scheduler.charge

        def record_charge(computed):
            running.append((len(engine.running), computed))
            charge(computed)

        engine.scheduler.charge = record_charge
        jobs = [choice_of(small, gen_length=8) for _ in range(3)]
        return await asyncio.gather(*(answer(engine, job) for job in jobs)), jobs

    with engine_of(small, max_running=1) as engine:
        updates, jobs = asyncio.run(run(engine))
        totals = engine.totals
    assert len({update.stable.text for update in updates}) == 1
    assert [number for number, _ in running] == [0, 0, 0]  # one after the other, each in a turn of its own
    assert [computed for _, computed in running] == [job.tokens for job in jobs]
    assert (totals.steps, totals.turns_with_steps, totals.finished, totals.failed) == (3, 3, 3, 0)
    assert totals.tokens == 3 * updates[0].stable.tokens


def test_a_choice_goes_before_long_answers(small):
    async def run(engine, turns):
        long = engine.submit(job_of(small, gen_length=1024, block_length=8)).updates()
        await turns.until(anext(long))
        await turns.until(answer(engine, choice_of(small)))
        return engine.totals.finished

    with engine_of(small, max_running=2) as engine, turns_of(engine) as turns:
        assert asyncio.run(run(engine, turns)) == 1


def test_choices_that_do_not_fit_or_are_given_up(small):
    async def run(engine, turns):
        with pytest.raises(InputError, match="none of them empty"):
            await turns.until(answer(engine, choice_of(small, choices=("", "red"))))
        long = engine.submit(job_of(small, gen_length=256, block_length=8)).updates()
        await turns.until(anext(long))
        waiting = engine.submit(choice_of(small))
        waiting.cancel()
        with pytest.raises(VidLaDAError, match="cancelled"):
            await turns.until(anext(waiting.updates()))
        await long.aclose()
        turns.open()
        assert (await answer(engine, choice_of(small))).stable.text

    with engine_of(small, max_running=1) as engine, turns_of(engine) as turns:
        asyncio.run(run(engine, turns))
        assert (engine.totals.failed, engine.totals.finished) == (1, 1)
        assert not engine.running


def test_tiled_images_are_encoded_piece_by_piece(small, monkeypatch):
    tiling = Tiling("anyres_max_4", 36, 3)
    image = np.random.default_rng(4).integers(0, 255, (100, 170, 3), np.uint8)
    pictures, shape = tiling.cut(image)
    monkeypatch.setattr(small.model.config, "image_aspect_ratio", "anyres_max_4")
    monkeypatch.setattr(small.processor, "image_aspect_ratio", "anyres_max_4")
    frames = Frames(pictures, (0.0,), (0,), INFO)
    content = [{"type": "image"}, {"type": "text", "text": "is it red ?"}]
    encoded = small.processor.encode([{"role": "user", "content": content}], [shape])
    settings = small.settings(gen_length=16, cache="mars")
    with engine_of(small) as engine:
        job = EngineRequest(encoded, [MediaInput("image", frames, shape)], settings)
        update = asyncio.run(answer(engine, job))
    assert len(pictures) > 8  # more than a turn of the tower
    assert update.stable.text == small.ask(image, "is it red ?", gen_length=16, cache="mars").text
