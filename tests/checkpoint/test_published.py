"""Checkpoints as people have them: any config.json of the family loads, or is refused by what is wrong with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import (
    llada_json,
    llada_state,
    published_json,
    published_state,
    write_folder,
    write_tower_config,
)
from safetensors.torch import load_file, save_file

import vidlada
from vidlada.checkpoint.configs import OWN_FIELDS
from vidlada.checkpoint.convert import convert
from vidlada.checkpoint.load import describe, load_model, save_model
from vidlada.checkpoint.tower import TOWER_FOLDER_VARIABLE
from vidlada.errors import InputError

TOWER = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture(scope="module")
def towers(tmp_path_factory, small):
    """Where VISION_TOWER_CACHE_DIR points: the small tower's configuration."""
    root = tmp_path_factory.mktemp("towers")
    write_tower_config(root / "google" / "siglip-small", small.model.config)
    return root


@pytest.fixture(autouse=True)
def tower_variable(monkeypatch, towers):
    monkeypatch.setenv(TOWER_FOLDER_VARIABLE, str(towers))


@pytest.fixture
def write(small, small_folder, tmp_path):
    """Write the small model in a published naming, with changes; returns the folder."""

    def write(naming="published", state=None, tokenizer=True, name="model", **changes):
        make, config = (llada_state, llada_json) if naming == "llada" else (published_state, published_json)
        folder = write_folder(tmp_path / name, {**make(small.model), **(state or {})}, config(small.model.config))
        values = {**config(small.model.config), **changes}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ABSENT}))
        for file in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
            shutil.copy(small_folder / file, folder)
        return folder

    return write


ABSENT = object()


def weights(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, state):
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def same(model, reference, without=()):
    state = reference.state_dict()
    for key, tensor in model.state_dict().items():
        if key not in without:
            assert torch.equal(tensor, state[key]), key


# --- what kind of checkpoint it is ---


@pytest.mark.parametrize("model_type", [ABSENT, None, "llama", "llada", "llava_llada", "vidlada", 5])
@pytest.mark.parametrize("naming", ["published", "llada"])
def test_the_kind_is_told_by_tensors_alone(small, write, naming, model_type):
    folder = write(naming, model_type=model_type, architectures=ABSENT)
    checkpoint = describe(folder)
    assert (checkpoint.layout, checkpoint.config.text_only) == (naming, naming == "llada")
    same(load_model(folder), small.model)


def test_a_language_model_alone(small, write):
    folder = write()
    rewrite(
        folder,
        {k: v for k, v in weights(folder).items() if not k.startswith(("model.vision", "model.mm_", "model.image"))},
    )
    model = load_model(folder)
    assert model.config.text_only and model.config.system_message == ""
    same(model, small.model)


def test_lavida_is_refused_by_name(write, small):
    seeing = {k: v for k, v in published_state(small.model).items() if k.startswith(("model.vision", "model.mm_"))}
    with pytest.raises(InputError, match="this is a LaViDa checkpoint .*not supported"):
        describe(write("llada", seeing))


def test_another_family(write):
    folder = write()
    rewrite(folder, {"transformer.h.0.attn.weight": torch.ones(1)})
    with pytest.raises(InputError, match="no checkpoint of this family: none of its 1 tensors"):
        describe(folder)


# --- values as files have them ---


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10000, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768.0, "vocab_size": 7},
        {"rope_theta": ABSENT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_scaling": {"type": "default"}, "hidden_act": "swish", "attention_bias": 0, "head_dim": 8},
        {"mm_spatial_pool_mode": None, "mm_newline_position": None, "mm_patch_merge_type": None},
        {"mm_projector_type": ABSENT, "mm_spatial_pool_stride": 4, "pretraining_tp": 2, "attention_dropout": 0.1},
        {"hidden_size": None, "num_hidden_layers": ABSENT, "intermediate_size": None, "vocab_size": ABSENT},
    ],
)
def test_other_spellings_load_to_the_same_model(small, write, changes):
    model = load_model(write(**changes))
    same(model, small.model)
    config, expected = model.config, small.model.config
    assert config.text.vocab_size == expected.text.vocab_size
    assert config.text.rope_theta == expected.text.rope_theta
    assert isinstance(config.text.max_position_embeddings, int)
    assert (config.spatial_pool_stride, config.spatial_pool_mode, config.newline_position) == (2, "bilinear", "grid")


def test_whole_numbers_for_fractions_and_limits_that_are_none(write):
    changes = {"tokenizer_model_max_length": 10**30, "max_position_embeddings": 1e30, "rms_norm_eps": 1}
    config = describe(write(**changes)).config
    assert (config.max_length, config.text.max_position_embeddings, config.text.rms_norm_eps) == (32768, 16384, 1.0)


def test_key_value_heads(write, small):
    grouped = {k: v for k, v in published_state(small.model).items() if "_proj" in k and (".k_" in k or ".v_" in k)}
    whole = {key: torch.cat((tensor, tensor)) for key, tensor in grouped.items()}
    assert describe(write(state=whole, num_key_value_heads=ABSENT)).config.text.num_key_value_heads == 4
    with pytest.raises(InputError, match=r"k_proj.weight is \[16, 32\], not \[32, 32\]"):
        load_model(write(num_key_value_heads=None, name="grouped"))


def test_no_row_newlines(write, small):
    config = describe(write(mm_patch_merge_type="flat")).config
    assert config.newline_position == "no_token" and config.tokens_per_frame() == 4
    folder = write(mm_newline_position="no_token", name="without")
    rewrite(folder, {key: tensor for key, tensor in weights(folder).items() if key != "model.image_newline"})
    same(load_model(folder), small.model, without=["vision.newline"])


def test_tied_embeddings(write, small):
    folder = write(tie_word_embeddings=True)
    assert not load_model(folder).config.tie_word_embeddings  # it has a head of its own
    rewrite(folder, {key: tensor for key, tensor in weights(folder).items() if key != "lm_head.weight"})
    model = load_model(folder)
    assert model.lm_head.weight is model.language_model.embed_tokens.weight
    same(model, small.model, without=["lm_head.weight"])
    convert(folder, folder.with_name("ours"), "vidlada")
    assert "lm_head.weight" not in weights(folder.with_name("ours"))
    same(load_model(folder.with_name("ours")), model)
    model.save_pretrained(folder.with_name("saved"))
    same(load_model(folder.with_name("saved")), model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(InputError, match="missing keys: lm_head.weight"):
        load_model(folder)


@pytest.mark.parametrize("naming", ["published", "llada"])
@pytest.mark.parametrize("named", ["config", "tokenizer", "neither"])
def test_tokens_with_a_role(write, small, naming, named):
    expected = small.model.config
    names = ("mask_token_id", "eos_token_id", "pad_token_id")
    changes = {name: getattr(expected, name) if named == "config" else ABSENT for name in names}
    folder = write(naming, tokenizer=named == "tokenizer", bos_token_id=128000, **changes)
    if named == "neither":
        with pytest.raises(InputError, match="no mask_token_id within the .* no tokenizer.json that has <|mdm_mask|>"):
            describe(folder)
        return
    config = describe(folder).config
    assert [getattr(config, name) for name in names] == [getattr(expected, name) for name in names]
    if named == "tokenizer":
        assert config.bos_token_id == expected.bos_token_id
        assert list(config.suppressed_token_ids) == list(expected.suppressed_token_ids)
        assert list(config.stop_token_ids) == list(expected.stop_token_ids)
    else:
        assert config.bos_token_id is None and config.stop_token_ids == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .* scaled rotary"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters is .* scaled rotary"),
        ({"attention_bias": True}, "attention_bias is True; that is not implemented; only False"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'; .*only 'mlp2x_gelu'"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type is 'perceiver'"),
        ({"mm_patch_merge_type": "spiral"}, "mm_patch_merge_type is 'spiral'; known are"),
        ({"add_faster_video": True}, "add_faster_video"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .*not implemented; only null"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but the weights' is 2"),
        ({"num_hidden_layers": 1}, "unknown keys: model.layers.1"),
        ({"hidden_size": 64}, "hidden_size is 64, but the weights' is 32"),
        ({"num_attention_heads": ABSENT}, "num_attention_heads is None; the weights do not tell it"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not divisible by num_attention_heads 5"),
        ({"num_attention_heads": 32}, "rotary positions need an even width"),
        ({"rope_theta": -1}, "rope_theta is -1; it must be a number above 0"),
        ({"tokenizer_model_max_length": "long"}, "tokenizer_model_max_length is 'long'; it must be a whole number"),
        ({"vidlada": {"mask_token_id": 500}}, r"mask_token_id \[500\] is not within the 2"),
    ],
)
def test_what_would_be_ignored_is_refused(write, changes, message):
    with pytest.raises(InputError, match=message):
        load_model(write(**changes))


@pytest.mark.parametrize("field", ["include_bias", "alibi", "attention_layer_norm", "scale_logits", "input_emb_norm"])
def test_what_the_text_only_ancestor_can_do_and_we_cannot(write, field):
    with pytest.raises(InputError, match=f"{field} is True; that is not implemented"):
        describe(write("llada", **{field: True}))


def test_one_key_value_head(write, small):
    grouped = {k: v[:8] for k, v in llada_state(small.model).items() if k.split(".")[-2] in ("k_proj", "v_proj")}
    folder = write("llada", grouped, n_kv_heads=None, multi_query_attention=True)
    assert load_model(folder).config.text.num_key_value_heads == 1


# --- the vision tower ---


def with_last_layer(state):
    """The tower's never used last layer, head and positions put back, and other leftovers."""
    last = {k.replace("layers.1.", "layers.2."): v + 1 for k, v in state.items() if TOWER in k and "layers.1." in k}
    rest = {f"{TOWER}head.probe": torch.ones(1), f"{TOWER}embeddings.position_ids": torch.arange(9)[None],
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            "model.rotary_emb.inv_freq": torch.ones(4), "model.vision_resampler.x": torch.ones(1)}  # fmt: skip
    return {**state, **last, **rest}


@pytest.mark.parametrize("name", ["google/siglip-small", "/mnt/models/google/siglip-small", "siglip-small"])
def test_the_last_layer_is_cut_and_leftovers_are_passed_over(write, small, name, towers):
    if name == "siglip-small":
        write_tower_config(towers / name, small.model.config)
    folder = write(mm_vision_tower=name)
    rewrite(folder, with_last_layer(weights(folder)))
    same(load_model(folder), small.model)
    convert(folder, folder.with_name("back"), "published")
    assert weights(folder.with_name("back")).keys() == published_state(small.model).keys()
    same(load_model(folder.with_name("back")), small.model)  # it says what tower it has


def test_the_final_norm_may_be_missing(write, small):
    folder = write()
    rewrite(folder, {key: tensor for key, tensor in weights(folder).items() if "post_layernorm" not in key})
    same(
        load_model(folder),
        small.model,
        without=["vision.tower.post_layernorm.weight", "vision.tower.post_layernorm.bias"],
    )


def test_a_tower_of_another_depth(write, small, towers):
    write_tower_config(towers / "deep", small.model.config, num_hidden_layers=12)
    with pytest.raises(InputError, match="its vision tower has 2 layers; the tower it is has 12"):
        describe(write(mm_vision_tower="deep"))


def test_nothing_tells_the_tower(write):
    with pytest.raises(InputError, match="no config says how many heads .*nor how many layers"):
        describe(write(mm_vision_tower="/elsewhere/unknown-tower"))


@pytest.mark.parametrize("layers", [26, 27])
def test_the_known_tower_needs_no_config(small, tmp_path, layers):
    """As the 8B's may be: a path of another machine, nothing under VISION_TOWER_CACHE_DIR."""
    state = {key: tensor for key, tensor in published_state(small.model).items() if not key.startswith(TOWER)}
    state |= {
        f"{TOWER}embeddings.patch_embedding.weight": torch.zeros(1152, 3, 14, 14),
        f"{TOWER}embeddings.position_embedding.weight": torch.zeros(729, 1152),
        **{f"{TOWER}encoder.layers.{n}.mlp.fc1.weight": torch.zeros(4304, 1) for n in range(layers)},
    }
    name = "/mnt/hdd/google/siglip2-so400m-patch14-384"
    config = published_json(small.model.config, mm_vision_tower=name, mask_token_id=2)
    vision = describe(write_folder(tmp_path / "model", state, config)).config.vision
    assert (vision.num_hidden_layers, vision.num_attention_heads, vision.image_size) == (26, 16, 384)


# --- files ---


@pytest.mark.parametrize(("shards", "dtype"), [(1, torch.float32), (3, torch.bfloat16)])
def test_pickled_weights(small, tmp_path, shards, dtype):
    config = small.model.config
    values = published_json(config, mask_token_id=config.mask_token_id)
    folder = write_folder(tmp_path / "model", published_state(small.model), values, shards, pickled=True, dtype=dtype)
    model = load_model(folder)
    assert model.dtype == dtype
    same(load_model(folder), small.model.to(dtype) if dtype == torch.float32 else model)
    convert(folder, tmp_path / "ours", "vidlada")
    same(load_model(tmp_path / "ours"), model)


def test_weights_stored_in_a_type_that_is_not_loaded(write):
    folder = write()
    rewrite(folder, {key: tensor.to(torch.float8_e4m3fn) for key, tensor in weights(folder).items()})
    with pytest.raises(InputError, match="stored as F8_E4M3, which is not read"):
        load_model(folder)


# --- there and back ---


def test_a_conversion_keeps_what_the_source_said(write, small, tmp_path):
    folder = write(image_grid_pinpoints=[[1, 2]], some_new_field={"a": 1}, mm_vision_tower="google/siglip-small")
    convert(folder, tmp_path / "ours", "vidlada")
    model = load_model(tmp_path / "ours")
    save_model(model, small.processor, tmp_path / "trained")
    convert(tmp_path / "trained", tmp_path / "back", "published")
    source, back = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "back"))
    dropped = {"auto_map", "transformers_version"}
    assert {name for name, value in source.items() if back.get(name, "none") != value} == dropped
    for name in OWN_FIELDS:
        assert getattr(describe(tmp_path / "back").config, name) == getattr(model.config, name), name
    convert(tmp_path / "back", tmp_path / "again", "vidlada")
    same(load_model(tmp_path / "again"), small.model)


def test_settings_survive_every_layout(small, tmp_path, small_folder):
    for layout in ("published", "vidlada"):
        convert(small_folder, tmp_path / layout, layout)
        config, expected = load_model(tmp_path / layout).config, small.model.config
        for name in ("generation", "system_message", "mask_token_id", "stop_token_ids", "newline_position"):
            assert getattr(config, name) == getattr(expected, name), (layout, name)


# --- any value in any field ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([0, -1, 1, 2, 10**9, 10**30, 10**400, 0.5, 4.0, 1e308])
    | st.floats() | st.text(max_size=5) | st.sampled_from(["", "silu", "grid", "bilinear", "\0", "a/b" * 200]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)  # fmt: skip
FOUND = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def load_with(folder, file, change):
    """Load a folder with one value of a JSON file changed: it loads, or there is one InputError of one line."""
    kept = (folder / file).read_text()
    values = json.loads(kept)
    change(values)
    (folder / file).write_text(json.dumps(values))
    try:
        vidlada.load(folder, device="cpu")
    except InputError as error:
        assert str(error)
    finally:
        (folder / file).write_text(kept)


def fields_of(values, *inner):
    """Names of fields, those of inner objects behind a dot."""
    names = [name for name in values if name not in inner]
    return [*names, *inner, *(f"{name}.{field}" for name in inner for field in values[name])]


def set_field(values, name, value):
    outer, _, field = name.partition(".")
    if field:
        values[outer][field] = value
    else:
        values[outer] = value


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["vidlada", "published", "llada", "ours_as_published"])
def test_any_value_in_any_field(write, small_folder, tmp_path, layout):
    if layout in ("published", "llada"):
        folder = write(layout)
    else:
        convert(small_folder, tmp_path / "copy", "vidlada" if layout == "vidlada" else "published")
        folder = tmp_path / "copy"
    inner = {"vidlada": ("text_config", "vision_config", "generation"), "ours_as_published": ("vidlada",)}
    values = json.loads((folder / "config.json").read_text())
    names = fields_of(values, *inner.get(layout, ()))

    @FOUND
    @given(name=st.sampled_from(names), value=JSON)
    def check(name, value):
        load_with(folder, "config.json", lambda values: set_field(values, name, value))

    check()


@pytest.mark.slow
def test_any_value_in_a_towers_config(write, small, tmp_path):
    folder = write(mm_vision_tower="own")
    write_tower_config(folder / "own", small.model.config)
    values = json.loads((folder / "own" / "config.json").read_text())

    @FOUND
    @given(name=st.sampled_from(fields_of(values, "vision_config")), value=JSON)
    def check(name, value):
        load_with(folder, Path("own/config.json"), lambda values: set_field(values, name, value))

    check()


@pytest.mark.slow
def test_any_value_in_a_tokenizers_config(small_folder, tmp_path):
    folder = shutil.copytree(small_folder, tmp_path / "copy")
    names = [*json.loads((folder / "tokenizer_config.json").read_text()), "added_tokens_decoder", "model_max_length"]

    @FOUND
    @given(name=st.sampled_from(names), value=JSON)
    def check(name, value):
        load_with(folder, "tokenizer_config.json", lambda values: set_field(values, name, value))

    check()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "nope", "[]", "null", "5", "[" * 100_000, '{"a": NaN}', "\ufeff{}"])
def test_any_text_as_config(write, text):
    folder = write()
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(folder)
