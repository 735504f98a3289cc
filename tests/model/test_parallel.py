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
from vidlada.errors import InputError
from vidlada.model.config import VidLaDATextConfig
from vidlada.model.parallel import check_shares, launch

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


def ask_in(processes, folder):
    """What each process of a launch found."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
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
