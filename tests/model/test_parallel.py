"""A model divided among processes answers as in one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from media import write_video

import vidlada
from vidlada.decoding.cache import RequestCache
from vidlada.decoding.policies import parse_policy
from vidlada.decoding.sampler import Denoiser
from vidlada.errors import InputError, VidLaDAError
from vidlada.model.config import VidLaDATextConfig
from vidlada.model.language_model import LanguageModel
from vidlada.model.parallel import check_devices, check_shares, launch

OPTIONS = [
    {"cache": "none"}, {"cache": "dual"}, {"cache": "mars:text=2,ratio=1"}, {"cache": "frozen", "commit": "wino"},
    {"cache": "dkv", "temperature": 0.7}, {"cache": "prefix", "cfg_scale": 1.0}, {"cache": "mars", "kv_dtype": "int8"},
]  # fmt: skip
SCRIPT = """
import json, sys
import numpy as np, torch
import vidlada
from vidlada.errors import InputError
torch.set_num_threads(1)
processes, options = int(sys.argv[1]), json.loads(sys.argv[2])
model = vidlada.load(tensor_parallel=processes)
video = np.random.default_rng(0).integers(0, 256, (4, 84, 84, 3), dtype=np.uint8)
found = [model.ask(video, "what happens ?", gen_length=32, **each).token_ids for each in options]
chosen = model.ask(video, "is it red ?", choices=["yes", "no"]).text
try:
    model.ask(video, "what happens ?", cache="sparse")
    refused = ""
except InputError as error:
    refused = str(error)
local = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in model.model.parameters()]
with open(sys.argv[3] + str(torch.distributed.get_rank() if processes > 1 else 0), "w") as file:
    json.dump({"ids": found, "chosen": chosen, "refused": refused, "values": sum(part.numel() for part in local)}, file)
"""
UNEQUAL = """
import json, os, sys
import numpy as np, torch
import vidlada
from vidlada.decoding.memory import decoding_bytes, kept_bytes
from vidlada.decoding.running import RunningRequest
from vidlada.engine import core
from vidlada.model import free_memory
torch.set_num_threads(1)
processes, rank = int(sys.argv[1]), int(os.environ.get("RANK", "0"))
model = vidlada.load(tensor_parallel=processes)
settings = model.settings(gen_length=16, cache="dual")
text = model.model.config.text
kept = []  # of every answer: what is said, and what it is

class Rows(core.Denoiser):
    most, now = 0, []
    def step(self):
        Rows.now = self.rows
        found = super().step()
        Rows.most = max(Rows.most, len(self.rows))
        for row in self.rows:
            cache = row.caches[0].kv_cache
            kept.append([kept_bytes(text, cache.tokens, 0, settings, 4, processes), cache.nbytes()])
        return found

core.Denoiser = Rows
tokens = len(model.chat(None).request("is it red ?").prompt) + 16
each = decoding_bytes(text, [(tokens, 0, settings)], 4, processes).peak
room = {0: 3.5, 1: 2.5}[rank] * each
taken = lambda: sum(row.caches[0].kv_cache.nbytes() for row in Rows.now if row.caches[0].kv_cache)
free_memory.free_memory = lambda device: int(room - taken())
model._check_memory = lambda *arguments: None  # it has room for a longer question
found = model.ask_many([(None, "is it red ?")] * 4, gen_length=16, cache="dual")
free_memory.free_memory = lambda device: 2**24 + rank * 2**20
frames = model.frames_that_fit([], 1, settings)
free_memory.free_memory = lambda device: None if rank else 5
least = [each.free for each in free_memory.free_memory_of(model.model.language_model)]
free_memory.free_memory, compared = lambda device: None, list(kept)
if rank:
    RunningRequest.export_visual = lambda self: None  # had no memory for a copy
chat = model.chat(np.random.default_rng(0).integers(0, 256, (4, 84, 84, 3), dtype=np.uint8), gen_length=16,
                  cache="dual", reuse=2)
turns = [chat.ask("is it red ?").token_ids for _ in range(2)]
with open(sys.argv[3] + str(rank), "w") as file:
    json.dump({"ids": [answer.token_ids for answer in found], "turns": turns, "reused": chat.visual is not None,
               "frames": frames, "least": least,
               "rows": Rows.most, "kept": compared}, file)
"""


def ask_in(processes, folder, text=SCRIPT):
    """What each process of a launch found."""
    script = folder / "script.py"
    script.write_text(text)
    start = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(script), str(processes), json.dumps(OPTIONS), str(folder / f"of{processes}-")]
    subprocess.run(
        [sys.executable, *start, *arguments], check=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return [json.loads((folder / f"of{processes}-{rank}").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_give_the_ids_of_one(tmp_path):
    (alone,) = ask_in(1, tmp_path)
    first, second = ask_in(2, tmp_path)
    assert first == second
    assert (first["ids"], first["chosen"]) == (alone["ids"], alone["chosen"])
    assert all(alone["ids"]) and not alone["refused"]
    assert first["refused"].startswith("cache sparse decides by the heads of all processes")
    assert first["values"] < 0.75 * alone["values"]  # norms, embeddings and tower are whole


@pytest.mark.slow
def test_processes_with_unequal_memory_decide_alike(tmp_path):
    (alone,) = ask_in(1, tmp_path, UNEQUAL)
    first, second = ask_in(2, tmp_path, UNEQUAL)
    assert first == second
    assert first["ids"] == alone["ids"]
    assert (first["reused"], alone["reused"]) == (False, True)
    assert (first["rows"], alone["rows"]) == (2, 3)
    assert first["frames"] > 0
    assert first["least"] == [5] == alone["least"]
    for said, kept in first["kept"] + alone["kept"]:
        assert kept <= said <= 1.1 * kept


def test_running_out_of_memory_in_one_process_ends_all(small, monkeypatch):
    """The others may be in a later pass: nothing could be repeated together with them."""
    steps = []

    def fail(self):
        steps.append(len(self.rows))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(LanguageModel, "processes", 2)
    monkeypatch.setattr("vidlada.model.free_memory.least_of_processes", lambda layer, number: number)
    monkeypatch.setattr(Denoiser, "step", fail)
    with pytest.raises(VidLaDAError, match="ran out of memory.*with tensor parallelism no step can be repeated"):
        small.ask_many([(None, "is it red ?")] * 2, gen_length=8, cache="dual")
    assert steps == [2]


@pytest.mark.parametrize(("said", "shown"), [
    ("error: no room here\\n[W] a warning\\n", "no room here"), ("Traceback\\nValueError: odd", "ValueError: odd"),
    ("", "ended with 3"),
])  # fmt: skip
def test_another_process_that_fails_is_heard(said, shown, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("vidlada.model.parallel.SECONDS_TO_FAIL", 0.1)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    failing = f"import os, sys, time\nif os.environ['RANK'] == '0': time.sleep(60)\nsys.stderr.write('{said}')\n"
    (tmp_path / "sitecustomize.py").write_text(f"{failing}sys.stderr.flush()\nos._exit(3)\n")
    assert launch(["--help"], 2) == 3
    assert capfd.readouterr().err == f"error: process 1: {shown}\n"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for device in (None, "cuda", "cuda:0"):
        check_devices(1, device)
        with pytest.raises(InputError, match="over 2 processes needs a GPU for each, and there are 1"):
            check_devices(2, device)
    check_devices(2, "cpu")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    check_devices(2, None)


@pytest.mark.slow
def test_by_the_command_line(tmp_path, capfd):
    clip = str(write_video(tmp_path / "clip.mp4", frames=50))
    command = ["ask", clip, "what happens ?", "--gen-length", "16", "--json"]
    assert launch([*command, "--tensor-parallel", "2"], 2) == 0
    divided = json.loads(capfd.readouterr().out)  # one object: the second process is silent
    assert launch(command, 1) == 0
    whole = json.loads(capfd.readouterr().out)
    assert divided["answer"] == whole["answer"]
    assert launch([*command, "--tensor-parallel", "2", "--cache", "elastic"], 2) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: cache elastic decides") and error.count("\n") == 1


def test_alone_it_says_how_to_start(small_folder):
    with pytest.raises(InputError, match="over 2 processes was asked for, and 1 run; start them with torchrun"):
        vidlada.load(small_folder, tensor_parallel=2)
    with pytest.raises(InputError, match="excludes quantization"):
        vidlada.load(small_folder, tensor_parallel=2, quantization="int8")


def test_what_does_not_divide_is_refused():
    check_shares(VidLaDATextConfig(), 8)
    with pytest.raises(InputError, match="num_key_value_heads 32 is not divisible"):
        check_shares(VidLaDATextConfig(), 3)


@pytest.mark.parametrize("cache", ["interval", "mars:drift=0.1", "dllm", "mars:window=1,anchors=1"])
def test_what_looks_at_all_heads_is_refused(cache):
    config = VidLaDATextConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2)
    prompt, frames = torch.zeros(9, 32), [-1, 0, 0, 1, 1, 2, 2, 3, 3]
    RequestCache(config, parse_policy("mars"), prompt, frames, 4, 13, heads=2)
    with pytest.raises(InputError, match="decides by the heads of all processes"):
        RequestCache(config, parse_policy(cache), prompt, frames, 4, 13, heads=2)
