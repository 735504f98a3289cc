"""Every published naming through the command line: a folder with random weights is described, asked, served, adapted,
converted and pushed, and one of them evaluated."""

import json

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from hub import running_hub, use_hub
from media import write_video
from PIL import Image
from published import llada_json, llada_state, published_json, published_state, write_folder, write_tower_config
from safetensors.torch import load_file
from serve.running import KEY, running_server

import vidlada
from vidlada.checkpoint.tower import TOWER_FOLDER_VARIABLE
from vidlada.cli import main
from vidlada.training.models import new_model

pytestmark = pytest.mark.slow

SHAPE = {
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "rope_theta": 10000.0},
    "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "image_size": 60, "patch_size": 20, "vision_use_head": False},
}  # fmt: skip
THINK = ("<think>", "</think>", "<stop_think>", "<answer>")
NAMINGS = ("video", "image", "think", "shards_bf16", "text", "language_model")


@pytest.fixture(scope="module", params=NAMINGS)
def checkpoint(request, tmp_path_factory):
    """A folder in a published naming, and whether it sees."""
    root = tmp_path_factory.mktemp(request.param)
    model, processor = new_model(SHAPE, seed=3)
    tokenizer, config = processor.tokenizer, model.config
    if request.param == "think":
        tokenizer.add_tokens(list(THINK), special_tokens=True)
        model.resize_token_embeddings(len(tokenizer))
    folder, common = root / "checkpoint", {"tokenizer_model_max_length": 2048}
    if request.param == "text":
        write_folder(folder, llada_state(model), llada_json(config))
    elif request.param == "language_model":
        state = {
            k: v
            for k, v in published_state(model).items()
            if k.startswith(("model.layers", "model.embed", "model.norm", "lm_"))
        }
        write_folder(folder, state, published_json(config, model_type="llama", **common))
    else:
        kinds = {"image": {"model_type": "llava_llada", "architectures": ["LlavaLLaDAModelLM"]}}
        packed = {"shards": 3, "dtype": torch.bfloat16} if request.param == "shards_bf16" else {}
        values = published_json(config, **common, **kinds.get(request.param, {}))
        write_folder(folder, published_state(model), values, **packed)
    tokenizer.save_pretrained(folder)
    write_tower_config(root / "towers" / "google" / "siglip-small", config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOWER_FOLDER_VARIABLE, str(root / "towers"))
        yield folder, request.param not in ("text", "language_model")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=50)


@pytest.fixture(scope="module")
def picture(clip):
    """An image that is cut into tiles."""
    pixels = np.random.default_rng(4).integers(0, 255, (90, 200, 3), np.uint8)
    Image.fromarray(pixels).save(clip.parent / "picture.png")
    return clip.parent / "picture.png"


def run(*arguments):
    """A command in this process, which must succeed; its standard output."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="vidlada")
    assert done.exit_code == 0, (done.stderr, done.exception)
    return done.stdout


def test_info_and_ask(checkpoint, clip):
    folder, sees = checkpoint
    facts = json.loads(run("info", folder, "--json"))["checkpoint"]
    assert facts["layout"] == ("llada" if folder.parent.name.startswith("text") else "published")
    assert facts["stored_as"] == ("BF16" if "bf16" in folder.parent.name else "F32")
    assert facts["vocabulary"] == len(vidlada.load(folder, device="cpu").processor.tokenizer)
    question = ("is it red ?", "--model", folder, "--gen-length", 8)
    if sees:
        assert json.loads(run("ask", clip, *question, "--json"))["frames"]
    else:
        refused = CliRunner().invoke(main, ["ask", str(clip), *map(str, question)])
        assert refused.exit_code == 2 and "text-only" in refused.stderr
        assert vidlada.load(folder, device="cpu").ask(None, "is it red ?", gen_length=8).finish_reason


def test_serve(checkpoint, clip, picture):
    """Text, a thought, a video and an image by HTTP: what `vidlada.ask` answers."""
    folder, sees = checkpoint
    options = {"gen_length": 8, "block_length": 8}
    model = vidlada.load(folder, device="cpu")
    with running_server("--model", folder, "--allow-dir", clip.parent, VIDLADA_API_KEYS=KEY,
                        OMP_NUM_THREADS="1") as server, server.http() as http:  # fmt: skip

        def ask(*shown, **extra):
            kinds = {".mp4": "video_url", ".png": "image_url"}
            parts = [{"type": kinds[path.suffix], kinds[path.suffix]: {"url": path.as_uri()}} for path in shown]
            content = [*parts, {"type": "text", "text": "is it red ?"}]
            body = {"model": folder.name, "messages": [{"role": "user", "content": content}], **options, **extra}
            answer = http.post("/v1/chat/completions", json=body)
            assert answer.status_code == (200 if sees or not shown else 422), answer.text
            if answer.status_code == 422:
                assert "text-only" in answer.json()["error"]["message"]
                return None
            return answer.json()["choices"][0]["message"]

        assert ask()["content"] == model.ask(None, "is it red ?", **options).text
        thought, expected = ask(think=True, think_length=8), {"think": True, "think_length": 8, **options}
        assert thought.get("reasoning_content", "") == model.ask(None, "is it red ?", **expected).reasoning
        for shown in ([clip], [picture], [picture, clip]):
            message = ask(*shown)
            if sees:
                assert message["content"] == model.ask(shown, "is it red ?", **options).text


def test_train_adapters_and_merge(checkpoint, tmp_path, clip):
    pytest.importorskip("peft")
    folder, sees = checkpoint
    entry = {"id": 1, "conversations": [{"from": "human", "value": "is it red ?"}, {"from": "gpt", "value": "yes"}]}
    if sees:
        entry |= {"video": clip.name}
        entry["conversations"][0]["value"] = "<image>\nis it red ?"
    (tmp_path / "data.json").write_text(json.dumps([entry] * 2))
    data = {
        "kind": "llava",
        "json_path": str(tmp_path / "data.json"),
        "video_folder": str(clip.parent),
        "batch_size": 1,
    }
    if sees:
        data["sampling"] = {"max_frames": 2}
    config = {"output": str(tmp_path / "run"), "init_from": str(folder), "workers": 0, "precision": "no",
              "lora": {"rank": 2, "alpha": 4}, "checkpoint_every": 5, "warmup_steps": 1,
              "stages": [{"name": "only", "steps": 1, "learning_rate": 1.0e-3, "data": data}]}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    adapter = run("train", tmp_path / "run.yaml").splitlines()[-1]  # DeepSpeed may warn before
    run("merge", adapter, tmp_path / "merged")
    assert json.loads(run("info", tmp_path / "merged", "--json"))["checkpoint"]["layout"] == "vidlada"


@pytest.mark.parametrize("checkpoint", ["video"], indirect=True)  # lmms-eval loads them all as the other commands do
def test_evaluate(checkpoint, tmp_path):
    pytest.importorskip("lmms_eval")
    printed = run("eval", "run", "--tasks", "shapes", "--limit", 1, "--shapes-clips", 1, "--model", checkpoint[0],
                  "--frames", 2, "--data-root", tmp_path / "data", "--output", tmp_path / "run")  # fmt: skip
    assert "shapes" in printed


def test_convert_and_push(checkpoint, tmp_path, monkeypatch):
    folder, sees = checkpoint
    run("convert", folder, tmp_path / "ours")
    layout = json.loads(run("info", folder, "--json"))["checkpoint"]["layout"]
    run("convert", tmp_path / "ours", tmp_path / "back", "--to", layout)
    names = [
        {key for file in place.glob("*.safetensors") for key in load_file(file)}
        for place in (folder, tmp_path / "back")
    ]
    assert names[0] == names[1]
    with running_hub() as hub:
        use_hub(monkeypatch, hub.endpoint, tmp_path / "cache")
        assert hub.endpoint in run("push", folder, "owner/name")
        pushed = vidlada.load("owner/name", device="cpu")
    assert pushed.model.config.text_only != sees
    expected = vidlada.load(folder, device="cpu").model.state_dict()
    for key, tensor in pushed.model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
