"""Processes that load a checkpoint to train it hold no more of it in the host's memory than what they train there."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from processes import free_port
from safetensors.torch import load_file
from trainings import MODEL, run, write_llama

from vidlada.checkpoint.load import describe, save_model
from vidlada.info import parameter_count
from vidlada.training.config import Stage
from vidlada.training.models import new_model
from vidlada.training.parallel import weights_place

pytestmark = pytest.mark.slow

TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
        "num_key_value_heads": 8}  # fmt: skip
# What a process has for itself, pages of files not counted, at its most while it loads, and what it had before
PROGRAM = """
import json, os, sys, threading, time
from vidlada.training.config import TrainingConfig
from vidlada.training.models import initial_model
from vidlada.training.parallel import make_accelerator, weights_come_from_main, weights_place

def own():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

config = TrainingConfig(**json.loads(sys.argv[1]))
if config.parallel.startswith("zero"):  # over gloo: its own way within one machine takes minutes to compile
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
accelerator = make_accelerator(config)
most, loaded = [own()], threading.Event()

def watch():
    while not loaded.wait(0.002):
        most.append(own())

watcher = threading.Thread(target=watch)
before = own()
watcher.start()
model, _ = initial_model(config, not weights_come_from_main(accelerator), *weights_place(accelerator))
loaded.set()
watcher.join()
print(json.dumps([os.environ["RANK"], max(most) - before]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in bfloat16."""
    where = tmp_path_factory.mktemp("base") / "model"
    model, processor = new_model({**MODEL, "text_config": TEXT}, 0)
    save_model(model, processor, where, dtype=torch.bfloat16)
    return where


def peaks(settings, weights, tmp_path):
    """Of two processes, in bytes a weight."""
    values = asdict(run(tmp_path / "run", precision="bf16", **{"model": None, **settings}))
    variables = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
                 "OMP_NUM_THREADS": "1"}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(values, default=str)], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    found: dict[str, float] = {}
    for rank in ranks:
        printed, errors = rank.communicate(timeout=600)
        assert rank.returncode == 0, errors
        number, peak = json.loads(printed.splitlines()[-1])
        found[number] = peak / weights
    return found["0"], found["1"]


# On a CPU the device is the host: what is trained in float32 is there once, what stays as it is stored is in the file,
# and of what ZeRO-3 divides there is a half, beside layers just read (the heap gives them back late). A whole copy
# beside that half would be 3 bytes a weight, one in float32 5.
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts pages of the process, as Linux lists them")
@pytest.mark.parametrize(
    ("parallel", "main", "other"), [("ddp", 5, 5), ("fsdp", 5, 0.5), ("zero2", 0.5, 0.5), ("zero3", 2.8, 2.8)]
)
def test_a_process_holds_what_it_trains(folder, tmp_path, parallel, main, other):
    if parallel.startswith("zero"):
        pytest.importorskip("deepspeed")
    found = peaks({"init_from": str(folder), "parallel": parallel}, parameter_count(describe(folder)), tmp_path)
    assert found[0] < main and found[1] < other
    if parallel == "ddp":  # else nothing would be counted
        assert min(found) > 3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts pages of the process, as Linux lists them")
@pytest.mark.parametrize(("parallel", "most"), [("ddp", 5), ("zero2", 3)])
def test_a_llama_is_held_once(tmp_path, parallel, most):
    if parallel.startswith("zero"):
        pytest.importorskip("deepspeed")
    llama = write_llama(tmp_path / "llama", dtype=torch.bfloat16, tie_word_embeddings=False, **TEXT)
    weights = sum(math.prod(tensor.shape) for tensor in load_file(llama / "model.safetensors").values())
    settings = {"init_from": str(llama), "model": {"text_only": True}, "parallel": parallel}
    settings["stages"] = (Stage("a", 1e-3, {"kind": "shapes", "text_only_share": 1.0}, 1),)
    assert max(peaks(settings, weights, tmp_path)) < most


def test_weights_go_to_the_device_in_the_type_of_the_run():
    device = torch.device("cuda", 1)

    def place(kind, precision, stage=2):
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
        return weights_place(
            SimpleNamespace(device=device, mixed_precision=precision, distributed_type=kind, state=state)
        )

    assert place(DistributedType.MULTI_GPU, "bf16") == (device, torch.float32)
    assert place(DistributedType.DEEPSPEED, "bf16") == (device, torch.bfloat16)
    assert place(DistributedType.DEEPSPEED, "no") == (device, torch.float32)
    assert place(DistributedType.DEEPSPEED, "bf16", 3) == (torch.device("cpu"), torch.bfloat16)
