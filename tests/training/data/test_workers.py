"""Processes that make batches: in order, never too far ahead, and ended whatever happens to them."""

import multiprocessing
import os
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from processes import wait_for

from vidlada.errors import InputError, VidLaDAError
from vidlada.training.data.collate import Part
from vidlada.training.data.workers import AHEAD, prefetch_batches

PARTS = [Part(step) for step in range(30)]


class Steps:
    """A data set that notes every step it makes, and does something at one of them."""

    def __init__(self, folder, at=None, do=None):
        self.folder, self.at, self.do = folder, at, do

    def __getitem__(self, part):
        (self.folder / str(part.step)).touch()
        if part.step == self.at:
            self.do()
        return {"step": part.step, "values": torch.full((1000,), part.step), "process": os.getpid()}


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def refuse():
    raise InputError("this clip cannot be used")


def divide():
    return 1 / 0


def test_batches_come_in_order_from_all_workers(tmp_path):
    batches = list(prefetch_batches(Steps(tmp_path), PARTS, 3))
    assert [batch["step"] for batch in batches] == list(range(30))
    assert all((batch["values"] == batch["step"]).all() for batch in batches)
    assert len({batch["process"] for batch in batches}) == 3
    assert list(prefetch_batches(Steps(tmp_path), [], 2)) == []
    assert not multiprocessing.active_children()


def test_workers_are_not_far_ahead(tmp_path):
    with closing(prefetch_batches(Steps(tmp_path), PARTS, 2)) as batches:
        next(batches)
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2 * AHEAD + 1, 20)
        time.sleep(0.2)
        assert len(list(tmp_path.iterdir())) == 2 * AHEAD + 1
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_told_and_none_is_left(tmp_path, workers):
    batches = prefetch_batches(Steps(tmp_path, 13, kill_itself), PARTS, workers)
    with pytest.raises(VidLaDAError, match=r"killed \(SIGKILL\).*--resume"):
        list(batches)
    assert not multiprocessing.active_children()


def test_a_worker_killed_while_others_start_is_told(tmp_path):
    """Evaluation starts workers of its own while those of training live."""
    with closing(prefetch_batches(Steps(tmp_path), PARTS, 2)) as batches:
        next(batches)
        multiprocessing.active_children()[0].kill()
        assert len(list(prefetch_batches(Steps(tmp_path), PARTS, 2))) == 30
        with pytest.raises(VidLaDAError, match="SIGKILL"):
            list(batches)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_stays_what_it_is(tmp_path, workers):
    with pytest.raises(InputError) as caught:
        list(prefetch_batches(Steps(tmp_path, 3, refuse), PARTS, workers))
    assert str(caught.value) == "this clip cannot be used"


def test_an_error_of_ours_brings_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="in divide"):
        list(prefetch_batches(Steps(tmp_path, 3, divide), PARTS, 1))
    assert not multiprocessing.active_children()


def test_no_worker_outlives_a_killed_run(tmp_path):
    def run():
        batches = prefetch_batches(Steps(tmp_path), PARTS, 2)
        found = [next(batches) for _ in range(2)]
        (tmp_path / "workers").write_text(" ".join(str(batch["process"]) for batch in found))
        kill_itself()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(20)
    for worker in (tmp_path / "workers").read_text().split():
        wait_for(lambda worker=worker: not alive(worker), 20)


def alive(process):
    """Whether a process runs; one that nobody has waited for yet has ended too."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
