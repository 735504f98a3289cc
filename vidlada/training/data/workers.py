"""Batches made ahead by other processes.

Each has a pipe of its own. The workers of torch's loader share a queue, an event and their locks, which a killed one
may leave locked for all, and their death raises an error wherever the main process happens to be.
"""

import signal
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.multiprocessing import Pipe, Process

from vidlada.errors import VidLaDAError
from vidlada.training.data.collate import Part, StepDataset

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
AHEAD = 4  # batches a worker holds or makes
PATIENCE = 5.0  # seconds for a worker to finish its batch when no more are needed


def prefetch_batches(dataset: StepDataset, parts: Iterable[Part], workers: int) -> Generator[dict[str, Any]]:
    """The batches of some parts, in order; when this is closed, no worker is left.

    Args:
        dataset: makes them.
        parts: which.
        workers: processes; 0 to make them here.

    Raises:
        VidLaDAError: a worker was killed, or the data cannot be used.
    """
    if workers == 0:
        yield from map(dataset.__getitem__, parts)
        return
    left = iter(parts)
    pool: list[Worker] = []
    try:
        for _ in range(workers):
            pool.append(Worker(dataset, [worker.pipe for worker in pool]))
        waiting = deque(worker for _ in range(AHEAD) for worker in pool if worker.ask(next(left, None)))
        while waiting:
            worker = waiting.popleft()
            batch = worker.receive()
            if worker.ask(next(left, None)):
                waiting.append(worker)
            yield batch
    finally:
        for worker in pool:
            worker.pipe.close()
        for worker in pool:
            worker.end()


class Worker:
    """A process that makes batches.

    Args:
        dataset: makes them.
        others: this process's ends of other workers' pipes, of which a forked process must not keep copies: a pipe
            tells of an end only when all of its copies are closed.
    """

    def __init__(self, dataset: StepDataset, others: Sequence[Connection]):
        self.pipe, there = Pipe()
        with closing(there):
            self.process = Process(target=work, args=(dataset, there, [*others, self.pipe]), daemon=True)
            self.process.start()

    def ask(self, part: Part | None) -> bool:
        """Have a part made; whether there is one."""
        if part is not None:
            try:
                self.pipe.send(part)
            except OSError as error:
                raise self._killed_error() from error
        return part is not None

    def receive(self) -> dict[str, Any]:
        """The batch of the part that was asked for first."""
        try:
            batch = self.pipe.recv()
        except (OSError, EOFError) as error:
            raise self._killed_error() from error
        if isinstance(batch, Exception):
            raise batch
        return batch

    def end(self) -> None:
        """Wait until it has noticed that its pipe is closed; one that is stuck is killed."""
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()

    def _killed_error(self) -> VidLaDAError:
        self.process.join(PATIENCE)
        code = self.process.exitcode
        how = f" ({signal.Signals(-code).name})" if code is not None and code < 0 else ""
        return VidLaDAError(
            f"a process that prepares batches was killed{how}, as happens where memory, or the shared memory in "
            "/dev/shm, runs out; lower workers, or the frames of a batch, and continue with --resume"
        )


def work(dataset: StepDataset, pipe: Connection, others: Sequence[Connection]) -> None:
    """Make what the pipe asks for, until it is closed."""
    for number in STOP_SIGNALS:  # a group's signal reaches workers too, which must go on until a checkpoint is written
        signal.signal(number, signal.SIG_IGN)
    for other in others:
        other.close()
    torch.set_num_threads(1)
    while True:
        try:
            part = pipe.recv()
        except (OSError, EOFError):
            return
        try:
            batch: dict[str, Any] | Exception = dataset[part]
        except VidLaDAError as error:
            batch = error
        except Exception:
            batch = RuntimeError(f"in a process that prepares batches:\n{traceback.format_exc()}")
        try:
            pipe.send(batch)
        except OSError:
            return
