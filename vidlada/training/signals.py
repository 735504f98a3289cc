"""SIGTERM and Ctrl-C during a run: it ends after the current step, with a checkpoint."""

import signal
from types import FrameType, TracebackType
from typing import Any

from vidlada.errors import VidLaDAError
from vidlada.training.data.workers import STOP_SIGNALS


class Interrupted(VidLaDAError):  # noqa: N818 - not an error: it went as asked
    """The run was asked to stop and has saved a checkpoint."""

    exit_code = 130


class StopSignals:
    """The signals that came while this is entered; their former handlers are put back at the end."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self.previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)

    def interruption(self, done: int) -> Interrupted:
        """What ends the run after so many steps, in every process, whichever got the signal."""
        number = (self.received or [signal.SIGTERM])[0]
        return Interrupted(f"stopped by signal {number} after step {done}; continue with --resume")
