"""Lines answered all over a Ray cluster, one model for every GPU, through Ray Data.

Ray starts a worker anew when its process or machine dies, and gives its unfinished lines out again; the answers come
back in order.
"""

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vidlada.api import VidLaDA
from vidlada.batch.local import Answerer, Line
from vidlada.errors import InputError, VidLaDAError

# read when ray is imported: tell nobody what is run, and despair of an address within minutes
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if "RAY_ADDRESS" in os.environ:
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")

try:
    import ray
    import ray.data
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise InputError(f"a cluster needs more packages: pip install 'vidlada[ray]' ({error.name})") from error

LINES_A_TASK = 8  # given out, and after a death answered anew, together
MOST_RESTARTS = 8  # of a worker: a line that kills its worker is not tried for ever


class Worker:
    """What Ray keeps on every GPU; arguments as of `answer_on_cluster`."""

    def __init__(self, load: Callable[[], VidLaDA], folder: Path, defaults: dict[str, Any], concurrency: int):
        self.refusal = ""
        try:
            self.answerer = Answerer(load(), folder, defaults, concurrency)
        except InputError as error:  # here Ray would try again
            self.refusal = " ".join(str(error).split())

    async def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """A line's output. Both are JSON: what lines hold has no common type that a table could have."""
        if self.refusal:
            raise InputError(self.refusal)
        return {"output": json.dumps(await self.answerer.answer(Line(**json.loads(row["line"]))))}


def connect() -> None:
    """Join the cluster, or start one here; Ray is to keep the order and be silent."""
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (RayError, ConnectionError, ValueError) as error:
        raise InputError(f"no Ray cluster: {error}") from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what matters arrives as an exception
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # so that InputError can be distinguished from a failure


def answer_on_cluster(
    load: Callable[[], VidLaDA],
    lines: Sequence[Line],
    folder: Path,
    defaults: dict[str, Any],
    concurrency: int,
    workers: int | None,
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Answer lines on the cluster of $RAY_ADDRESS, or on this machine, and write the answers in order.

    Args:
        load: gives a worker its model.
        lines: to answer.
        folder: that relative paths of videos start from, on every machine.
        defaults: settings that lines may change.
        concurrency: answers a worker denoises together.
        workers: models; as many as there are GPUs by default.
        write: takes the output lines.

    Raises:
        InputError: the cluster cannot be reached, or has no GPU and `workers` is not given; what loading raises.
        VidLaDAError: workers cannot start, or die again and again.
    """
    if not lines:
        return
    connect()
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if workers is None and not gpus:
            raise InputError("the cluster has no GPU; say with --workers how many models are to share its CPUs")
        rows = ray.data.from_items(
            [{"line": json.dumps(asdict(line))} for line in lines],
            override_num_blocks=math.ceil(len(lines) / LINES_A_TASK),
        )
        pool = ray.data.ActorPoolStrategy(
            size=workers or gpus, max_concurrent_calls_per_actor=math.ceil(2 * concurrency / LINES_A_TASK)
        )
        with warnings.catch_warnings(category=ray.util.annotations.RayDeprecationWarning, action="ignore"):
            # of keywords like max_restarts, which nothing replaces yet
            outputs = rows.map(
                Worker, fn_constructor_args=(load, folder, defaults, concurrency), compute=pool, num_gpus=min(gpus, 1),
                max_restarts=MOST_RESTARTS,
            )  # fmt: skip
        with closing(iter(outputs.iter_rows())) as results:  # Ray Data's thread must end before Ray does
            for row in results:
                write(json.loads(row["output"]))
    except RayError as error:
        if isinstance(error, RayTaskError) and isinstance(error.cause, InputError):  # Ray adds remarks to its text
            raise InputError(str(error.cause).splitlines()[0]) from error
        # the cause stands behind the tracebacks of all processes between
        raise VidLaDAError(f"a worker failed: {str(error).strip().splitlines()[-1]}") from error
    finally:
        ray.shutdown()
