"""Checkpoints on a hub of this machine, and folders that transformers' Auto classes load."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hub import running_hub, use_hub
from published import llada_json, llada_state, write_folder
from safetensors.torch import load_file

import vidlada
from vidlada.checkpoint.load import load_model
from vidlada.checkpoint.publish import push
from vidlada.errors import InputError, VidLaDAError
from vidlada.model.hub import local_folder

EVERYTHING = {"config.json", "model.safetensors", "modeling_vidlada.py", "processor_config.json", "README.md",
              "tokenizer.json", "tokenizer_config.json"}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "cache")
        yield server


def test_push_and_load(hub, small, small_folder):
    address = push(small_folder, "owner/name", private=True)
    assert address.startswith(f"{hub.endpoint}/owner/name/commit/")
    assert "private" in (hub.created["owner/name"].get("visibility"), *hub.created["owner/name"])
    files = hub.repositories["owner/name", "main"]
    assert files.keys() >= EVERYTHING
    assert files["model.safetensors"] == (small_folder / "model.safetensors").read_bytes()
    assert "AutoModel" in json.loads(files["config.json"])["auto_map"]
    assert b'vidlada ask "video.mp4"' in files["README.md"] and b"library_name: vidlada" in files["README.md"]
    loaded = vidlada.load("owner/name", device="cpu")
    assert loaded.name == "owner/name"
    for key, tensor in small.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], tensor)


def test_push_from_python_to_a_branch(hub, small):
    small.push_to_hub("owner/name", revision="trial")
    assert hub.repositories["owner/name", "trial"].keys() >= EVERYTHING
    assert "model.safetensors" not in hub.repositories["owner/name", "main"]
    assert vidlada.load("owner/name", device="cpu", revision="trial").name == "owner/name@trial"


def test_another_layout_is_converted_and_its_card_kept(hub, small, small_folder, tmp_path):
    folder = write_folder(tmp_path / "llada", llada_state(small.model), llada_json(small.model.config))
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        push(folder, "owner/text")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((small_folder / name).read_bytes())
    (folder / "README.md").write_text("mine")
    push(folder, "owner/text")
    assert hub.repositories["owner/text", "main"]["README.md"] == b"mine"
    assert vidlada.load("owner/text", device="cpu").model.config.text_only


def test_what_cannot_be_pushed(hub, small_folder, tmp_path):
    for name in ("name", "a/b/c", "owner/name@main", ""):
        with pytest.raises(InputError, match="is no name of a repository"):
            push(small_folder, name)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is an adapter; write the whole model first"):
        push(tmp_path / "adapter", "owner/name")
    hub.token = "secret"
    with pytest.raises(VidLaDAError, match="owner/name could not be uploaded to http://127.0.0.1.*HF_TOKEN"):
        push(small_folder, "owner/name")
    assert not hub.repositories


def test_an_adapter_and_its_base_from_the_hub(hub, small, small_folder, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        load_model(small_folder), peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
    )
    adapted.peft_config["default"].base_model_name_or_path = "owner/base@v1"
    adapted.save_pretrained(tmp_path / "adapter")
    small.processor.save_pretrained(tmp_path / "adapter")
    hub.publish("owner/base", small_folder, "v1")
    hub.publish("owner/adapter", tmp_path / "adapter")
    loaded = vidlada.load("owner/adapter", device="cpu")
    assert torch.equal(loaded.model.lm_head.weight, small.model.lm_head.weight)
    assert vidlada.load("owner/base@v1", adapter="owner/adapter", device="cpu").name == "owner/base@v1"


def environment(hub, tmp_path, **changes):
    return {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1", **changes}  # fmt: skip


WEIGHTS = {"model-00001-of-00002.safetensors": b"small", "model-00002-of-00002.safetensors": bytes(24 * 2**20)}


@pytest.mark.slow
def test_a_broken_connection_goes_on_in_the_middle_of_a_file(hub):
    hub.repositories["owner/name", "main"] = {"config.json": b"{}", **WEIGHTS}
    hub.stall_at = 16 * 2**20  # the client writes 10 MB at a time
    hub.released.set()
    folder = local_folder("owner/name")
    assert {name: (folder / name).read_bytes() for name in WEIGHTS} == WEIGHTS
    assert 0 < hub.ranges["model-00002-of-00002.safetensors"] <= hub.stall_at


@pytest.mark.slow
def test_a_killed_download_goes_on_where_files_are_missing(hub, tmp_path):
    hub.repositories["owner/name", "main"] = {"config.json": b"{}", **WEIGHTS}
    hub.stall_at = 16 * 2**20
    code = "from vidlada.model.hub import local_folder; print(local_folder('owner/name'))"
    command = [sys.executable, "-c", code]
    variables = environment(hub, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="300")

    def run(**more):
        return subprocess.run(command, env={**variables, **more}, capture_output=True, text=True)

    first = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert hub.stalled.wait(120)
    while len(list((tmp_path / "home" / "hub").glob("models--owner--name/snapshots/*/*"))) < 2:
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    hub.released.set()
    offline = run(HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "HF_HUB_OFFLINE forbids" in offline.stderr.splitlines()[-1]
    second = run()
    assert second.returncode == 0, second.stderr
    assert sorted(hub.fetched) == sorted(["config.json", *WEIGHTS, "model-00002-of-00002.safetensors"])
    for done in (second, run(HF_HUB_OFFLINE="1")):
        assert {name: (Path(done.stdout.strip()) / name).read_bytes() for name in WEIGHTS} == WEIGHTS


AUTO = """
import sys
{before}
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
for auto in (AutoModel, AutoModelForImageTextToText):
    model = auto.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor([{{"role": "user", "content": "is it red ?"}}])
print(type(model).__name__, type(processor).__name__, tuple(model(**inputs).logits.shape)[0])
"""
WITHOUT_VIDLADA = "sys.modules['vidlada'] = None"  # an import then fails as where it is not installed


@pytest.mark.slow
@pytest.mark.parametrize("made_by", ["save", "convert"])
def test_auto_classes_in_a_fresh_process(small, small_folder, tmp_path, made_by):
    from vidlada.checkpoint.convert import convert
    from vidlada.checkpoint.load import save_model

    if made_by == "save":
        save_model(small.model, small.processor, tmp_path / "model")
    else:
        convert(small_folder, tmp_path / "model", "vidlada")

    def run(before):
        return subprocess.run(
            [sys.executable, "-c", AUTO.format(before=before), str(tmp_path / "model")], capture_output=True, text=True,
            env={**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}, cwd=tmp_path,
        )  # fmt: skip

    done = run("")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["VidLaDAForMaskedDiffusion", "VidLaDAProcessor", "1"]
    done = run(WITHOUT_VIDLADA)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        "ImportError: this checkpoint needs the vidlada package: pip install vidlada"
    )


def test_a_tower_from_the_hub(hub, small, small_folder, tmp_path, monkeypatch):
    from published import published_json, published_state, write_tower_config
    from safetensors.torch import save_file

    monkeypatch.delenv("VISION_TOWER_CACHE_DIR", raising=False)
    prefix = "model.vision_tower.vision_tower."
    state, config = published_state(small.model), small.model.config
    tower = write_tower_config(tmp_path / "tower", config)
    save_file(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, tower / "model.safetensors"
    )
    hub.publish("google/siglip-small", tower)
    rest = {k: v for k, v in state.items() if not k.startswith(prefix)}
    folder = write_folder(tmp_path / "model", rest, published_json(config, mask_token_id=config.mask_token_id))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((small_folder / name).read_bytes())
    loaded = vidlada.load(folder, device="cpu").model
    for key, tensor in small.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    assert load_file(local_folder("google/siglip-small") / "model.safetensors").keys()
