"""`python -m vidlada.training.launch`: torchrun, whose failures end in a line instead of a trace.

A process that fails has said why; torchrun adds a trace of its own on every node, thirty lines that tell only that one
ended.
"""

import logging
import os
import sys
from collections.abc import Sequence

# read by torch as it is imported: it would log a trace of its own for every process that ends early, and where the
# first node ends before the others
QUIET = {"LOGLEVEL": "CRITICAL", "TORCH_CPP_LOG_LEVEL": "ERROR"}
quieted = QUIET.keys() - os.environ.keys()
os.environ.update({name: QUIET[name] for name in quieted})
from torch.distributed import DistError  # noqa: E402
from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402
from torch.distributed.elastic.rendezvous import RendezvousError  # noqa: E402
from torch.distributed.run import main as torchrun  # noqa: E402

for name in quieted:  # the processes themselves log as always
    del os.environ[name]


def launch(arguments: Sequence[str]) -> int:
    """Start processes as torchrun does and wait for them.

    Args:
        arguments: of torchrun.

    Returns:
        The exit code: that of the process that failed first, or 1.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(list(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it could not say anything itself
            print_error(f"process {rank} was killed ({failure.signal_name()}); continue with --resume")
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as error:
        return 128 + error.sigval
    except (RendezvousError, DistError) as error:
        print_error(f"the other nodes cannot be reached, or have ended: {' '.join(str(error).splitlines()[:1])}")
        return 1
    return 0


def print_error(line: str) -> None:
    """Print an error as the command line does."""
    print(f"error: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
