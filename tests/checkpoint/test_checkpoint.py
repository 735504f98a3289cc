"""Checkpoint folders: every layout loads to the same model, and what does not fit is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from published import llada_state
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vectors import formula_state_dict, load_reference_model, our_key, published_config

import vidlada
from vidlada.checkpoint.convert import convert
from vidlada.checkpoint.layouts import tensor_name
from vidlada.checkpoint.load import describe, load_model, load_tokenizer
from vidlada.checkpoint.tensors import INDEX
from vidlada.checkpoint.tower import TOWER_FOLDER_VARIABLE
from vidlada.errors import InputError
from vidlada.model.config import VidLaDAConfig
from vidlada.model.video_model import VidLaDAForMaskedDiffusion

TOWER_KEY = "model.vision_tower.vision_tower.vision_model."


def write_published(folder, state, shards=3, **changes):
    """A sharded checkpoint with an index, as the published ones are."""
    folder.mkdir()
    names = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    keys = sorted(state)
    for n, name in enumerate(names):
        save_file({key: state[key].contiguous() for key in keys[n::shards]}, folder / name, metadata={"format": "pt"})
    weight_map = {key: names[i % shards] for i, key in enumerate(keys)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**published_config("gqa"), "mm_vision_tower": "siglip", **changes}))
    return folder


def write_tower_config(folder):
    """The config.json of the formula model's tower, with its last layer, as its own folder has it."""
    folder.mkdir(parents=True)
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
              "num_attention_heads": 2, "image_size": 384, "patch_size": 14}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": vision}))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The formula model's published checkpoint; beside it the folder of its tower's configuration."""
    root = tmp_path_factory.mktemp("published")
    folder = write_published(root / "VidLaDA", formula_state_dict("gqa"))
    write_tower_config(folder / "siglip")
    return folder


@pytest.fixture
def copy(published, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(published, tmp_path / "copy")


def same(model, reference):
    state = reference.state_dict()
    assert model.state_dict().keys() == state.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def test_published_layout(published):
    checkpoint = describe(published)
    assert checkpoint.layout == "published"
    assert checkpoint.config.text_config.num_key_value_heads == 2
    model = load_model(published)
    same(model, load_reference_model("gqa"))
    assert model.vision.tower.embeddings.position_ids.device.type == "cpu"


def test_loaded_model_runs_like_the_recorded_one(published):
    from vectors import arrays, pixels

    model = load_model(published).eval()
    with torch.no_grad():
        features = model.vision.features(pixels(104, 2))
    assert torch.allclose(features, torch.from_numpy(arrays("gqa")["vision.features"]), rtol=0, atol=5e-5)


def test_llava_llada_naming_of_the_family(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "llava_llada"}))
    same(load_model(copy), load_reference_model("gqa"))


def test_dtype(published):
    assert load_model(published, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["banana", "nn", "int8"])
def test_unknown_types_are_refused(published, dtype):
    with pytest.raises(InputError, match=f"unknown type of weights '{dtype}'; use auto, float32"):
        load_model(published, dtype=dtype)
    with pytest.raises(InputError, match=dtype):
        vidlada.load(published, dtype=dtype)


def test_headers_are_read_once(small_folder, monkeypatch):
    read = []
    plain = vidlada.checkpoint.load.read_entries
    monkeypatch.setattr("vidlada.checkpoint.load.read_entries", lambda folder: (read.append(folder), plain(folder))[1])
    vidlada.load(small_folder)
    assert read == [small_folder]


def test_device_map(published):
    model = load_model(published, device_map="auto")
    same(model, load_reference_model("gqa"))


def test_round_trip_through_our_layout(published, tmp_path):
    load_model(published).save_pretrained(tmp_path / "ours")
    assert describe(tmp_path / "ours").layout == "vidlada"
    same(load_model(tmp_path / "ours"), load_reference_model("gqa"))
    same(VidLaDAForMaskedDiffusion.from_pretrained(tmp_path / "ours"), load_reference_model("gqa"))


def test_convert_to_ours_and_back(published, tmp_path):
    convert(published, tmp_path / "ours", "vidlada")
    same(load_model(tmp_path / "ours"), load_reference_model("gqa"))
    convert(tmp_path / "ours", tmp_path / "theirs", "published")
    state = {}
    for file in (tmp_path / "theirs").glob("*.safetensors"):
        state.update(load_file(file))
    assert state.keys() == formula_state_dict("gqa").keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in formula_state_dict("gqa").items())
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for name in ("model_type", "hidden_size", "num_key_value_heads", "rope_theta", "mm_newline_position"):
        assert config[name] == published_config("gqa")[name]


def test_tower_under_its_cache_variable(tmp_path, monkeypatch):
    state = formula_state_dict("gqa")
    folder = write_published(tmp_path / "model", {k: v for k, v in state.items() if not k.startswith(TOWER_KEY)})
    with pytest.raises(InputError, match=f"siglip was not found.*{TOWER_FOLDER_VARIABLE}"):
        describe(folder)
    tower = write_tower_config(tmp_path / "towers" / "siglip")
    own = {"vision_model." + k.removeprefix(TOWER_KEY): v for k, v in state.items() if k.startswith(TOWER_KEY)}
    unused = {k.replace("layers.1.", "layers.2."): v + 1 for k, v in own.items() if "layers.1." in k}
    save_file({**own, **unused, "vision_model.head.probe": torch.ones(1)}, tower / "model.safetensors")
    monkeypatch.setenv(TOWER_FOLDER_VARIABLE, str(tmp_path / "towers"))
    same(load_model(folder), load_reference_model("gqa"))


def test_number_of_tower_heads_is_never_guessed(copy):
    shutil.rmtree(copy / "siglip")
    with pytest.raises(InputError, match="how many heads its vision tower of width 32"):
        load_model(copy)


def test_published_names_follow_the_recorded_table():
    for published_key in formula_state_dict("gqa"):
        assert tensor_name("published", our_key(published_key)) == published_key


# --- the text-only ancestor ---


@pytest.fixture
def llada(tmp_path):
    folder = tmp_path / "llada"
    folder.mkdir()
    save_file(llada_state(load_reference_model("gqa")), folder / "model.safetensors")
    config = {"model_type": "llada", "d_model": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2,
              "mlp_hidden_size": 128, "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096,
              "rms_norm_eps": 1e-5, "rope_theta": 500000.0}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_llada_layout(llada):
    model = load_model(llada)
    assert model.config.text_only
    reference = load_reference_model("gqa")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)
    with pytest.raises(InputError, match="text-only"):
        model.encode_media(torch.zeros(1, 3, 384, 384), [1])


def test_llada_converts_both_ways(llada, tmp_path):
    convert(llada, tmp_path / "ours", "vidlada")
    convert(tmp_path / "ours", tmp_path / "back", "llada")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == llada_state(load_reference_model("gqa")).keys()
    assert load_model(tmp_path / "back").config.text_config.to_dict() == load_model(llada).config.text_config.to_dict()
    convert(llada, tmp_path / "published", "published")
    same(load_model(tmp_path / "published"), load_model(llada))


# --- what does not fit ---


def change(folder, key, tensor):
    """Replace (or, with None, drop) a tensor in its shard and the index."""
    index = json.loads((folder / INDEX).read_text())
    name = index["weight_map"].setdefault(key, "model-00001-of-00003.safetensors")
    state = load_file(folder / name)
    if tensor is None:
        del state[key], index["weight_map"][key]
    else:
        state[key] = tensor
    save_file(state, folder / name, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("model.norm.weight", None, "missing keys: model.norm.weight"),
        ("model.layers.7.extra.weight", torch.ones(1), "unknown keys: model.layers.7.extra.weight"),
        ("model.mm_projector.0.weight", torch.ones(5, 5), r"model.mm_projector.0.weight is \[5, 5\], not \[64, 32\]"),
    ],
)
def test_key_errors_name_the_key(copy, key, tensor, message):
    change(copy, key, tensor)
    with pytest.raises(InputError, match=message):
        load_model(copy)


def test_missing_shard(copy):
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00003.safetensors is missing"):
        load_model(copy)


def test_damaged_shard(copy):
    (copy / "model-00002-of-00003.safetensors").write_bytes(b"\xff" * 1000)
    with pytest.raises(InputError, match="model-00002-of-00003.safetensors: damaged"):
        load_model(copy)


def test_pickled_objects_are_not_opened(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published_config("gqa")))
    torch.save({"model.norm.weight": Path("/")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin: damaged, or holds more than tensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"model_type": "llama"}'])
def test_not_our_config(copy, text):
    (copy / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json"):
        load_model(copy)


def test_no_tokenizer(published):
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_tokenizer(published)


def test_convert_keeps_what_is_there(published, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="in use"):
        convert(published, target, "vidlada")
    assert (target / "precious.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


# --- the real size ---


def test_8b_on_the_meta_device():
    with torch.device("meta"):
        model = VidLaDAForMaskedDiffusion(VidLaDAConfig())
    state = model.state_dict()
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_434_837_024
    names = {tensor_name("published", key) for key in state}
    layer = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip
    expected = {f"model.layers.{i}.{name}.weight" for i in range(32) for name in layer}
    expected |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.image_newline"}
    expected |= {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert {name for name in names if not name.startswith(TOWER_KEY)} == expected
    towers = [name for name in names if name.startswith(TOWER_KEY)]
    assert len(towers) == 26 * 16 + 3 + 2  # layers, embeddings, final norm
    assert state["language_model.layers.31.mlp.down_proj.weight"].shape == (4096, 12288)
    assert model.config.visual_tokens(64) == 13440


def test_headers_alone_describe(published):
    entry = describe(published).entries["lm_head.weight"]
    assert entry.shape == (126464, 64)
    with safe_open(entry.file, "pt") as tensors:
        assert "lm_head.weight" in set(tensors.keys())
