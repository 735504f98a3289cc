"""The order of requests, in tokens computed: nothing is timed."""

import asyncio

import pytest
import torch
from engine.test_engine import answer, engine_of, job_of

from vidlada.engine.limits import EngineLimits
from vidlada.engine.scheduler import EXTRA, Scheduler, Task
from vidlada.model.free_memory import DeviceMemory

LIMITS = EngineLimits()


def task_of(slots, prompt=60, **facts):
    return Task(tokens=prompt + slots, slots=slots, **facts)


def take_turn(scheduler, running):
    """One turn of answers that decide a token a step; the tokens the padded batch computes."""
    chosen = scheduler.turn(running)
    for task in chosen:
        task.update(task.steps + 1, task.decided + 1, task.computed + task.tokens)
    cost = len(chosen) * max(task.tokens for task in chosen)
    scheduler.charge(sum(task.tokens for task in chosen))
    return cost


def run_until(scheduler, running, done, most=10**6):
    """Tokens computed until a request is complete; others leave as they are done."""
    spent = 0
    while done.decided < done.slots:
        spent += take_turn(scheduler, [task for task in running if task.decided < task.slots])
        assert spent < most * max(task.tokens for task in running)
    return spent


def test_a_short_answer_takes_twice_its_work_beside_long_ones():
    scheduler, long, short = Scheduler(LIMITS), [task_of(1024) for _ in range(4)], task_of(128)
    for _ in range(10):
        take_turn(scheduler, long)
    spent = run_until(scheduler, [*long, short], short)
    step_of_all_long = sum(task.tokens for task in long)
    assert spent <= 2 * short.work + step_of_all_long
    assert spent < (128 * (step_of_all_long + short.tokens)) / 9  # than with a step of everything in every turn


def test_a_long_answer_gets_half_of_the_work_while_short_ones_keep_coming():
    scheduler, long, short, spent = Scheduler(LIMITS), task_of(1024), task_of(32), 0
    while long.decided < long.slots:
        if short.decided == short.slots:
            short = task_of(32)
        spent += take_turn(scheduler, [long, short])
    assert spent <= 2 * long.work + 3 * long.tokens


def test_nobody_starves():
    scheduler, running = Scheduler(LIMITS), [task_of(slots) for slots in (16, 64, 200, 700, 1000, 4000)]
    while pending := [task for task in running if task.decided < task.slots]:
        before = {task: task.steps for task in pending}
        spent = 0
        while spent < 4 * sum(task.tokens for task in pending) and len(pending) == len(before):
            spent += take_turn(scheduler, pending)
            pending = [task for task in pending if task.decided < task.slots]
        assert all(task.steps > before[task] or len(pending) < len(before) for task in pending)


def test_equal_answers_step_together():
    scheduler, running = Scheduler(LIMITS), [task_of(128) for _ in range(16)]
    for _ in range(20):
        assert len(scheduler.turn(running)) == 16
        scheduler.charge(16)


def test_cheap_steps_are_taken_together_whatever_their_lengths():
    """With a cache a step computes a block, whoever it is of: on a GPU more rows are free."""
    scheduler, running = Scheduler(LIMITS), [task_of(slots) for slots in (128, 256, 1024)]
    for task, step in zip(running, (33, 40, 60), strict=True):
        task.update(10, 10, 10 * step)
    assert set(scheduler.turn(running)) == set(running)


def test_work_is_estimated_from_what_was_seen():
    task = task_of(100, prompt=900)
    assert task.remaining == 100 * 1000
    task.update(10, 40, 10 * 200)
    assert task.remaining == pytest.approx(60 / 4 * 200)
    assert task_of(100, prompt=900, pace=4.0).remaining == 25 * 1000
    assert task_of(100, prompt=900, passes=2).remaining == 2 * 100 * 1000
    assert task.update(11, 44, 11 * 200) == 200


def test_an_answer_behind_a_thought_counts_anew():
    task = task_of(100, prompt=900)
    task.update(80, 90, 80 * 1000)
    task.restart(10)
    assert task.remaining == 10 * 1000
    assert task.update(1, 1, 500) == 500


def test_places_go_in_turns_to_the_shortest_and_the_oldest():
    scheduler = Scheduler(EngineLimits(max_running=3))
    long, short = [task_of(1000) for _ in range(4)], [task_of(8) for _ in range(4)]
    waiting, order = [*long, *short], []
    while waiting:
        order.append(scheduler.admit(waiting, []))
        waiting.remove(order[-1])
    assert order == [short[0], long[0], short[1], long[1], short[2], long[2], short[3], long[3]]


def test_short_requests_find_a_place_among_long_ones():
    limits = EngineLimits(max_running=8, max_running_tokens=10_000)
    scheduler, running = Scheduler(limits), [task_of(1000) for _ in range(8)]
    short, other, middle = task_of(64), task_of(1000), task_of(600)
    assert scheduler.admit([other, middle], running) is None
    for extra in range(8 // EXTRA):
        assert scheduler.admit([other, middle, short], running) is short, extra
        running, short = [*running, short], task_of(64)
    assert scheduler.admit([other, middle, short], running) is None


def test_what_waits_longest_is_not_passed_over_for_ever():
    """It does not fit beside what runs; the others that would are held back until it does."""
    scheduler = Scheduler(EngineLimits(max_running=8, max_running_tokens=1000))
    big, running = task_of(900, prompt=50), [task_of(100, prompt=100) for _ in range(2)]
    admitted = []
    for _ in range(10):
        task = scheduler.admit([big, task_of(100, prompt=100)], running)
        if task is None:
            running = running[1:]
            continue
        admitted.append(task)
        running = [*running, task]
        if task is big:
            break
    assert admitted[-1] is big
    assert len(admitted) <= 2


def test_a_question_without_a_video_does_not_wait_for_a_long_one():
    scheduler, video, text = Scheduler(LIMITS), task_of(128, frames=256), task_of(128)
    picked = [scheduler.prepare([video, text]) for _ in range(2)]
    assert set(picked) == {video, text}


def test_a_short_answer_beside_long_ones_in_the_engine(small):
    async def run(engine):
        handles = [engine.submit(job_of(small, gen_length=256, block_length=8)) for _ in range(4)]
        readers = [handle.updates() for handle in handles]
        for reader in readers:
            await anext(reader)
        before = [handle.task.steps for handle in handles]
        last = await answer(engine, job_of(small, question="count", gen_length=16))
        after = [handle.task.steps for handle in handles]
        for reader in readers:
            await reader.aclose()
        return last, [later - earlier for earlier, later in zip(before, after, strict=True)]

    with engine_of(small) as engine:
        last, steps = asyncio.run(run(engine))
        assert last.state.step == 16
        assert max(steps) <= 6  # 16 if every turn stepped them all


def test_a_text_question_is_answered_while_a_long_video_is_encoded(small):
    async def run(engine):
        video = engine.submit(job_of(small, frames=60, gen_length=16))
        text = engine.submit(job_of(small, question="count", gen_length=4, block_length=4))
        async for _ in text.updates():
            pass
        left = video.task.frames
        async for _ in video.updates():
            pass
        return left

    with engine_of(small) as engine:
        assert asyncio.run(run(engine)) > 0
        assert engine.totals.frames_encoded == 60


def free_on(*sizes):
    """Free memory of devices with as many layers each."""
    return [DeviceMemory(torch.device("cuda", number), 1 / len(sizes), size) for number, size in enumerate(sizes)]


def test_requests_wait_for_memory():
    free = [1000]
    scheduler = Scheduler(EngineLimits(max_running=8), lambda: free_on(free[0]))
    first, second, third = (task_of(64, kept=500, working=100) for _ in range(3))
    assert scheduler.admit([first], []) is first
    assert scheduler.admit([second], [first]) is None  # the first has not taken its memory yet
    first.update(1, 4, 100.0)
    free[0] = 500  # now it has
    assert scheduler.admit([second], [first]) is None
    assert scheduler.admit([second], []) is second  # alone, it may try
    free[0] = 699
    assert scheduler.admit([third], [first]) is None  # both may recompute everything in one step
    free[0] = 700
    assert scheduler.admit([third], [first]) is third


def test_the_next_refresh_of_all_has_room():
    """Between refreshes nothing of their working memory is in use, and none of it is free for others."""
    total, running = 1000, [task_of(64, kept=40, working=60)]
    scheduler = Scheduler(
        EngineLimits(max_running=64), lambda: free_on(total - sum(t.kept for t in running if t.steps))
    )
    while (task := scheduler.admit([task_of(64, kept=40, working=60)], running)) is not None:
        running.append(task)
        for each in running:
            each.update(each.steps + 1, each.decided + 1, each.computed + 10)
    assert len(running) == 10 == total // running[0].bytes


def test_a_model_on_several_devices():
    task, other = (task_of(64, kept=600, working=100) for _ in range(2))
    for free, admitted in (((800, 799), False), ((799, 800), False), ((800, 800), True)):
        scheduler = Scheduler(EngineLimits(max_running=8), lambda free=free: free_on(*free))
        assert (scheduler.admit([task], [other]) is task) is admitted
