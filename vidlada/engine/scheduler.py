"""Which requests run, and which of them take the next step.

Short answers do not wait for long ones, and long ones do not starve:
- half of the model's work goes to the answers with the least work left, the other half to those whose last step is the
  longest ago;
- half of the places that become free go to the request with the least work, the other half to the one that has waited
  longest, and a quarter more places than `max_running` are for requests much shorter than what runs.

Work is counted in tokens computed, not in seconds, so that the order does not depend on the machine.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf

from vidlada.engine.limits import EngineLimits
from vidlada.model.free_memory import DeviceMemory, fits

PEERS = 1.25  # rows whose steps cost the same to within this factor are stepped together
GROWTH = 17 / 16  # of the memory budget with every answer that is finished
EXTRA = 4  # one place, and one token, more for every so many, for requests with at most this part of the longest's work


@dataclass(eq=False)
class Task:
    """What the scheduler knows about a request.

    Attributes:
        tokens: positions it takes, prompt and answer slots.
        slots: of its answer, and of the thought before it.
        pace: slots that a step is planned to decide.
        passes: through the model in a step.
        frames: still to be encoded before it can join.
        kept: bytes of memory that it takes between its steps, from the first on.
        working: bytes that a step takes besides, which recomputes all.
        steps: done.
        decided: slots decided in them.
        computed: tokens computed in them.
        last_turn: number of the turn it last took a step in.
        work: tokens it was expected to compute when it came.
    """

    tokens: int
    slots: int
    pace: float = 1.0
    passes: int = 1
    frames: int = 0
    kept: int = 0
    working: int = 0
    steps: int = 0
    decided: int = 0
    computed: float = 0.0
    last_turn: int = 0
    work: float = field(init=False)

    def __post_init__(self) -> None:
        self.work = self.remaining

    @property
    def bytes(self) -> int:
        """Of memory that it takes at its peak."""
        return self.kept + self.working

    @property
    def step_tokens(self) -> float:
        """Tokens a step computes: as so far, or the whole sequence before the first."""
        return self.computed / self.steps if self.steps else float(self.tokens * self.passes)

    @property
    def remaining(self) -> float:
        """Tokens it is expected to compute yet."""
        pace = max(1.0, self.decided / self.steps) if self.steps else self.pace
        return (self.slots - self.decided) / pace * self.step_tokens

    def update(self, steps: int, decided: int, computed: float) -> float:
        """Take note of what was done so far; gives the tokens computed since the last note."""
        new = computed - self.computed
        self.steps, self.decided, self.computed = steps, decided, computed
        return new

    def restart(self, slots: int) -> None:
        """Begin to count anew: a thought is complete, and the answer behind it has slots of its own."""
        self.slots, self.steps, self.decided, self.computed = slots, 0, 0, 0.0


class Scheduler:
    """The order of requests.

    Args:
        limits: `max_running`, `max_running_tokens` and `max_step_tokens` count here.
        free: gives the free memory of the model's devices.
    """

    def __init__(self, limits: EngineLimits, free: Callable[[], Sequence[DeviceMemory]] = lambda: ()):
        self.limits, self.free = limits, free
        self.turns = self.admissions = self.preparations = 0
        self.lead = 0.0  # tokens by which the shortest have had more than the oldest
        self.by_age = False  # how this turn's were chosen
        self.budget: float | None = None  # bytes that may run together; known once memory has run out
        self.failed = inf  # fewest bytes that ran together when it did

    def admit(self, waiting: Sequence[Task], running: Sequence[Task]) -> Task | None:
        """The request that gets a place now, if there is one for it.

        Args:
            waiting: in order of arrival.
            running: with those being prepared.
        """
        if not waiting:
            return None
        shortest = min(waiting, key=lambda task: task.work)
        first = waiting[0] if self.admissions % 2 else shortest
        if self.fits(first, running):
            self.admissions += 1
            return first
        if self.fits(shortest, running, EXTRA) and EXTRA * shortest.work <= max(task.work for task in running):
            return shortest
        return None

    def fits(self, task: Task, running: Sequence[Task], extra: int = 0) -> bool:
        """Whether there is room for a request; a lone one always fits.

        Args:
            task: the request.
            running: with those being prepared.
            extra: one place and one token more for every so many; 0 for none.
        """
        places, tokens = self.limits.max_running, self.limits.max_running_tokens
        if extra:
            places, tokens = places + places // extra, tokens + tokens // extra
        taken = sum(other.tokens for other in running)
        return not running or (
            len(running) < places and taken + task.tokens <= tokens and self.has_memory(task, running)
        )

    def has_memory(self, task: Task, running: Sequence[Task]) -> bool:
        """Whether a request fits into memory beside the others, as far as is known: what those keep that have not taken
        it yet, and the working memory of all, which may recompute everything in the same step."""
        together = [task, *running]
        if self.budget is not None and sum(each.bytes for each in together) > self.budget:
            return False
        kept = sum(each.kept for each in together if not each.steps)
        return fits(self.free(), kept, sum(each.working for each in together))

    def shrink_budget(self, running: Sequence[Task], preempted: Sequence[Task]) -> None:
        """Take note that memory ran out: fewer may run together from now on.

        Args:
            running: when it ran out, with those being prepared.
            preempted: of them.
        """
        # if all are, all but one of them may have fitted
        gone = preempted if len(preempted) < len(running) else preempted[:1]
        together = sum(task.bytes for task in running)
        self.failed = min(self.failed, together)
        self.budget = float(together - sum(task.bytes for task in gone))

    def grow_budget(self) -> None:
        """Take note that an answer is complete: a little more may run together, never again as much as failed."""
        if self.budget is not None:
            self.budget = min(self.budget * GROWTH, self.failed - 1)

    def prepare(self, tasks: Sequence[Task]) -> Task:
        """The request to prepare next: in turns the one with the fewest frames left and the first that came."""
        self.preparations += 1
        return min(tasks, key=lambda task: task.frames) if self.preparations % 2 else tasks[0]

    def turn(self, running: Iterable[Task]) -> list[Task]:
        """The requests that take the next step.

        With the one whose turn it is go those whose steps cost the same, and others as long as the batch, padded to
        its longest, stays within `max_step_tokens`.
        """
        self.turns += 1
        self.by_age = self.lead > 0
        by_work = sorted(running, key=lambda task: task.remaining)
        first = min(by_work, key=lambda task: task.last_turn) if self.by_age else by_work[0]
        chosen, longest = [first], first.step_tokens
        for task in by_work:
            if task is first:
                continue
            wider = max(longest, task.step_tokens)
            peers = first.step_tokens / PEERS <= task.step_tokens <= first.step_tokens * PEERS
            if peers or (len(chosen) + 1) * wider <= self.limits.max_step_tokens:
                chosen.append(task)
                longest = wider
        for task in chosen:
            task.last_turn = self.turns
        return chosen

    def charge(self, computed: float) -> None:
        """Take note of the tokens the turn computed."""
        self.lead += -computed if self.by_age else computed
