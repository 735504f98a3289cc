"""From waiting to answered: who gets a place, who takes the next step, and what happens when memory runs out.

One turn is at most one piece of preparation (a few frames through the vision tower, or one request joining) and one
step of some running answers, so new requests never stop the running ones for long.

- The scheduler chooses: short answers do not wait for long ones, and long ones get their share.
- An answer is the same as alone: requests share steps, not settings, blocks or random numbers.
- A chosen answer is a request of one step; a cancelled request is gone before the next step.
- When memory runs out, what is only kept to save time is given up; then the youngest request waits again, to be decoded
  from its start when there is room, and the others repeat the step. Only a request that does not fit alone fails.

Every way of asking goes through here: `VidLaDA.decode` turns it until its requests are answered, the server's engine in
a thread of its own.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from vidlada.decoding.memory import is_out_of_memory
from vidlada.decoding.request import check_predictions
from vidlada.decoding.sampler import Denoiser, State, Statistics
from vidlada.decoding.thinking import Turn
from vidlada.engine.choosing import ChoosingTurn
from vidlada.engine.entry import Entry, Update
from vidlada.engine.forms import FormTurn
from vidlada.engine.limits import EngineLimits
from vidlada.engine.scheduler import Scheduler
from vidlada.errors import VidLaDAError
from vidlada.model.free_memory import free_memory_of
from vidlada.model.video_model import VidLaDAForMaskedDiffusion

Result = TypeVar("Result")

log = logging.getLogger("vidlada.engine")


class MemoryExhaustedError(VidLaDAError):
    """A pass of the model ran out of memory."""


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
    preempted: int = 0
    stepping_seconds: float = 0.0


class EngineCore:
    """Requests of one model, turn by turn. Not to be shared between threads.

    Args:
        model: in evaluation mode.
        limits: of what runs together.
        static: as for `Denoiser`.
    """

    def __init__(self, model: VidLaDAForMaskedDiffusion, limits: EngineLimits, static: bool | None = None):
        self.model, self.limits = model, limits
        self.denoiser = Denoiser(model, static)
        self.totals = Totals()
        self.waiting: deque[Entry] = deque()
        self.joining: dict[Entry, Iterator[None]] = {}  # being prepared, in order of their places
        self.decoding: dict[int, Entry] = {}  # by their numbers in the denoiser
        self.choosing: list[Entry] = []  # to be answered without denoising
        self.scheduler = Scheduler(limits, partial(free_memory_of, model.language_model))

    @property
    def running(self) -> list[Entry]:
        """Requests that take steps."""
        return [*self.decoding.values(), *self.choosing]

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.joining or self.decoding or self.choosing)

    def turn(self) -> None:
        """One piece of preparation, and one step of the requests whose turn it is."""
        self._drop_cancelled()
        self.prepare()
        self.step()

    def _drop_cancelled(self) -> None:
        gone = [entry for entry in [*self.running, *self.joining] if entry.cancelled]
        self._remove(gone)
        gone += [entry for entry in self.waiting if entry.cancelled]
        self.waiting = deque(entry for entry in self.waiting if not entry.cancelled)
        self.totals.cancelled += len(gone)
        for entry in gone:
            entry.put(VidLaDAError("the request was cancelled"))

    def _remove(self, gone: Collection[Entry]) -> None:
        """Take requests out of whatever is done with them."""
        self.decoding = {number: entry for number, entry in self.decoding.items() if entry not in gone}
        self.choosing = [entry for entry in self.choosing if entry not in gone]
        self.denoiser.rows = [row for row in self.denoiser.rows if row.number in self.decoding]
        self.joining = {entry: pieces for entry, pieces in self.joining.items() if entry not in gone}

    def _admit(self) -> None:
        """Give places to requests that wait, as long as there are some."""
        while True:
            waiting = {entry.task: entry for entry in self.waiting}
            taken = [entry.task for entry in [*self.running, *self.joining]]
            task = self.scheduler.admit(list(waiting), taken)
            if task is None:
                return
            entry = waiting[task]
            self.waiting.remove(entry)
            entry.seconds["queue"] = time.perf_counter() - entry.submitted
            self.joining[entry] = entry.prepare()

    def prepare(self) -> bool:
        """One piece of preparation of one request that has a place; says whether there was one."""
        self._admit()
        if not self.joining:
            return False
        tasks = {entry.task: entry for entry in self.joining}
        entry = tasks[self.scheduler.prepare(list(tasks))]
        started = time.perf_counter()
        done = self._attempt(partial(self._prepare_piece, entry))
        if isinstance(done, VidLaDAError):
            self._recover(done, [entry], unusable=[entry])
            return True
        entry.seconds["vision"] = entry.seconds.get("vision", 0.0) + time.perf_counter() - started
        if done:
            del self.joining[entry]
        return True

    def _prepare_piece(self, entry: Entry) -> bool:
        """Go on with the preparation of a request, which joins when it is complete; says whether it is."""
        for _ in self.joining[entry]:
            return False
        if isinstance(entry.turn, ChoosingTurn | FormTurn) and entry.turn.choosing:
            self.choosing.append(entry)
        else:
            self._start(entry)
        return True

    def _start(self, entry: Entry) -> None:
        """Let what is to be decoded now join."""
        assert entry.turn is not None
        number, state = self.denoiser.add(entry.turn.request)
        self.decoding[number] = entry
        if state is not None:
            self._deliver(number, state)

    def step(self) -> None:
        """One step of the requests whose turn it is, if there are any."""
        if not self.running:
            return
        started = time.perf_counter()
        chosen = set(self.scheduler.turn(entry.task for entry in self.running))
        computed = self._choose([entry for entry in self.choosing if entry.task in chosen])
        computed += self._denoise({number for number, entry in self.decoding.items() if entry.task in chosen})
        self.totals.turns_with_steps += 1
        self.totals.stepping_seconds += time.perf_counter() - started
        self.scheduler.charge(computed)

    def _choose(self, entries: Iterable[Entry]) -> float:
        """One pass of requests that have something to choose; gives the tokens computed."""
        computed = 0.0
        for entry in entries:
            turn = entry.turn
            assert isinstance(turn, ChoosingTurn | FormTurn)
            earlier, found = turn.statistics, self._attempt(turn.step)
            if isinstance(found, VidLaDAError):
                self._recover(found, [entry])
                break  # others may be gone too
            state, stable, scores = found
            computed += self._count(entry, state.statistics, earlier)
            if turn.choosing:
                continue
            self.choosing.remove(entry)
            if stable.finish_reason is None:  # the rest of the form is to be decoded
                entry.task.restart(entry.settings.gen_length)
                error = self._attempt(partial(self._start, entry))
                if error is not None:
                    self._recover(error, [entry], [entry])
                    break
                continue
            entry.turn = None
            self._count_finished()
            entry.put(Update(state, stable, dict(entry.seconds), state.confidence, scores))
        return computed

    def _denoise(self, numbers: set[int]) -> float:
        """One denoising step of some requests; gives the tokens computed."""
        rows = [row for row in self.denoiser.rows if row.number in numbers]
        others = [row for row in self.denoiser.rows if row.number not in numbers]
        if not rows:
            return 0.0
        before = {row.number: row.statistics for row in rows}
        self.denoiser.rows, self.denoiser.unusable = rows, set()
        states = self._attempt(self.denoiser.step)
        self.denoiser.rows = [*self.denoiser.rows, *others]
        if isinstance(states, VidLaDAError):
            unusable = [self.decoding[number] for number in self.denoiser.unusable]
            self._recover(states, [self.decoding[number] for number in before], unusable)
            return 0.0
        computed, failed = 0.0, list[tuple[VidLaDAError, Entry]]()
        for number, state in states:
            entry = self.decoding[number]
            computed += self._count(entry, state.statistics, before[number])
            error = self._attempt(partial(self._deliver, number, state))
            if error is not None:
                failed.append((error, entry))
        for error, entry in failed:
            self._recover(error, [entry], [entry])
        return computed

    def _count(self, entry: Entry, statistics: Statistics, earlier: Statistics) -> float:
        """Take note of a step of a request; gives the tokens it computed."""
        totals = self.totals
        totals.steps += 1
        totals.tokens += statistics.tokens - earlier.tokens
        for segment, count in statistics.refreshes.items():
            totals.refreshes[segment] += count - earlier.refreshes.get(segment, 0)
        mean = sum(statistics.layer_tokens) / max(1, len(statistics.layer_tokens))
        return entry.task.update(statistics.steps, statistics.tokens, mean)

    def _deliver(self, number: int, state: State) -> None:
        """Send a state on; free the place of an answer that is complete."""
        check_predictions(state.confidence)
        entry = self.decoding[number]
        turn = entry.turn
        assert isinstance(turn, Turn | FormTurn)
        request = turn.request
        state, stable = turn.take(state)
        if stable.finish_reason is not None or turn.request is not request:
            self.denoiser.remove(number)
            del self.decoding[number]
        if stable.finish_reason is not None:
            entry.turn = None
            self._count_finished()
        entry.put(Update(state, stable, dict(entry.seconds), entry.confidence_after(state)))
        if turn.request is not request:  # the thought is complete, and the answer has slots of its own
            entry.begin_decoding()
            entry.task.restart(entry.settings.gen_length)
            self._start(entry)

    def _count_finished(self) -> None:
        """Take note of a complete answer."""
        self.totals.finished += 1
        self.scheduler.grow_budget()

    def _attempt(self, run: Callable[[], Result]) -> "Result | VidLaDAError":
        """What something returns, or the error it ends with, when the traceback, which keeps tensors alive, is gone."""
        try:
            return run()
        except Exception as error:
            return self.error_of(error)

    def _recover(self, error: VidLaDAError, failed: Collection[Entry], unusable: Collection[Entry] = ()) -> None:
        """Deal with an error.

        Args:
            error: if it is not that memory ran out, the requests it happened to fail.
            failed: those requests.
            unusable: those of them that cannot go on from where they were.
        """
        if not isinstance(error, MemoryExhaustedError):
            self._fail(error, failed)
            return
        taken = list(dict.fromkeys([*self.running, *self.joining, *failed]))
        if self.model.language_model.processes > 1:  # another may have had enough, and be in a later pass
            advice = "with tensor parallelism no step can be repeated; ask about fewer frames, or less at a time"
            self._fail(MemoryExhaustedError(f"{error}; {advice}"), taken)
            return
        released = self.release()
        if len(taken) == 1 and (not released or taken[0].retried):
            advice = "though nothing else was running; use fewer frames, a smaller gen_length or a smaller type"
            self._fail(MemoryExhaustedError(f"{error}, {advice}"), taken)
            return
        back = list(unusable) or ([] if released else [max(taken, key=lambda entry: entry.submitted)])
        if not released:
            self.scheduler.shrink_budget([entry.task for entry in taken], [entry.task for entry in back])
        log.warning("%s; %d of %d requests are put back", error, len(back), len(taken))
        self._remove(back)
        self.totals.preempted += len(back)
        for entry in sorted(back, key=lambda entry: entry.submitted, reverse=True):
            entry.retried = len(taken) == 1
            entry.reset()
            self.waiting.appendleft(entry)

    def release(self) -> bool:
        """Free what is only kept to save time; says whether that was anything worth a second try."""
        self.denoiser.clear_graphs()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def _fail(self, error: VidLaDAError, entries: Collection[Entry]) -> None:
        """Tell requests that there will be no answer."""
        self._remove(entries)
        for entry in entries:
            self.totals.failed += 1
            entry.put(error)

    def error_of(self, error: Exception) -> VidLaDAError:
        """An error that ends the requests it happened to; a defect is raised again."""
        if isinstance(error, VidLaDAError):
            return error
        if not is_out_of_memory(error):
            raise error
        return MemoryExhaustedError(f"the model ran out of memory: {str(error).splitlines()[0].rstrip('.')}")
