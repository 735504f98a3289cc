"""`vidlada` in processes of their own that do not import torch anew: each is forked from one that has imported it.

For settings that libraries read while they are imported (OMP_NUM_THREADS, HF_HOME, …), for the order of imports and for
launchers, tests start `python -m vidlada` itself.
"""

import atexit
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["vidlada.api", "vidlada.training.trainer", "vidlada.serve.app", "vidlada.cli", "peft"])


def wait_for(condition, seconds=200):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


class Command:
    """A running `vidlada ARGUMENTS`, with what `subprocess.Popen` offers and tests need.

    Args:
        arguments: of the command, or of `code`.
        code: Python to run in place of the command.
        stdin: text of standard input.
        pipe: let `stderr` be read while it runs; else output and errors are kept for afterwards.
        new_session: lead a process group.
        environment: further variables.

    Attributes:
        pid: of the process.
        stderr: file object to read while it runs, where `pipe` is set.
    """

    def __init__(self, *arguments, code=None, stdin="", pipe=False, new_session=False, **environment):
        folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._output, self._errors, source = (folder / name for name in ("out", "err", "in"))
        source.write_text(stdin)
        reader, writer = FORKS.Pipe(duplex=False) if pipe else (None, None)
        variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
        settings = ([str(each) for each in arguments], code, variables, Path.cwd(), new_session)
        self._process = FORKS.Process(target=_run, args=(*settings, source, self._output, writer or self._errors))
        self._process.start()
        # not a child like those that tests of workers count and kill; this class alone waits for it
        multiprocessing.process._children.discard(self._process)
        self.pid = self._process.pid
        if pipe:
            self.stderr = os.fdopen(os.dup(reader.fileno()), encoding="utf-8", errors="replace")
            reader.close()
            writer.close()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout=None):
        """The exit code, as `subprocess` counts it: minus the number of the signal that ended it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"vidlada ran for more than {timeout} seconds\n{self.errors}")
        return self._process.exitcode

    @property
    def output(self):
        return self._output.read_text()

    @property
    def errors(self):
        return self._errors.read_text() if self._errors.exists() else ""


def run_vidlada(*arguments, stdin="", timeout=300, **environment):
    """Run `vidlada ARGUMENTS`; returns exit code, stdout, stderr."""
    command = Command(*arguments, stdin=stdin, **environment)
    return command.wait(timeout), command.output, command.errors


def _run(arguments, code, environment, folder, new_session, source, output, errors):
    """What the forked process does."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if new_session:
        os.setsid()
    tempfile.tempdir = None  # TMPDIR may be another
    sys.argv = ["vidlada", *arguments]
    sys.stdin = source.open()
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
    if isinstance(errors, Path):
        with errors.open("w") as file:
            os.dup2(file.fileno(), 2)
    else:
        os.dup2(errors.fileno(), 2)
        errors.close()
    if "OMP_NUM_THREADS" in environment:
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    from vidlada.cli import main

    try:
        exec(code, {"__name__": "__main__"}) if code else main(arguments, prog_name="vidlada")
    finally:
        threading._shutdown()  # joins threads, as before the end of Python itself
        atexit._run_exitfuncs()  # a forked process ends without them
