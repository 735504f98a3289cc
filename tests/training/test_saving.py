"""The model folders of a run: in the type their source came in, and with the fields of its configuration."""

import json

import pytest
import torch
from safetensors import safe_open
from trainings import MODEL, PICTURES, assert_same, quietly, run, weights

import vidlada
from vidlada.checkpoint.convert import convert
from vidlada.checkpoint.load import load_model, save_model
from vidlada.errors import InputError
from vidlada.training.config import Lora, Stage
from vidlada.training.models import new_model
from vidlada.training.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

STILL = Stage("a", 1e-60, PICTURES, 1)  # moves no weight


def types(folder):
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a mapping
    return found


def source(folder, dtype, **changes):
    model, processor = new_model({**MODEL, **changes}, seed=3)
    save_model(model.to(dtype), processor, folder)
    return folder


def from_source(folder, output, **changes):
    return run(output, **{"model": None, "init_from": str(folder), "stages": (STILL,), **changes})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_is_written_as_its_source_came(tmp_path, dtype):
    """Every folder of it, bit for bit where nothing was learned; what is continued from stays float32."""
    folder = source(tmp_path / "source", dtype)
    settings = from_source(folder, tmp_path / "run", layouts=("vidlada", "published"))
    final = train(settings, report=quietly)
    checkpoint = tmp_path / "run" / "checkpoint-0000001"
    for written in (final, checkpoint / "model", tmp_path / "run" / "model-published"):
        assert types(written) == types(folder) and len(types(folder)) == 1
        assert_same(written, weights(folder))
    assert types(checkpoint) == {"F32"}
    name = str(dtype).removeprefix("torch.")
    assert json.loads((final / "config.json").read_text())["dtype"] == name
    assert json.loads((tmp_path / "run" / "model-published" / "config.json").read_text())["torch_dtype"] == name
    assert load_model(final).dtype == dtype


def test_another_type_can_be_asked_for(tmp_path):
    folder = source(tmp_path / "source", torch.bfloat16)
    assert types(train(from_source(folder, tmp_path / "a", save_dtype="float32"), report=quietly)) == {"F32"}
    assert types(train(run(tmp_path / "b", stages=(STILL,), save_dtype="float16"), report=quietly)) == {"F16"}
    assert types(train(run(tmp_path / "c", stages=(STILL,)), report=quietly)) == {"F32"}
    with pytest.raises(InputError, match="save_dtype: adapters are float32"):
        from_source(folder, tmp_path / "d", save_dtype="float16", lora=Lora())


def test_a_resumed_run_is_written_in_the_same_type(tmp_path):
    folder = source(tmp_path / "source", torch.bfloat16)
    settings = from_source(folder, tmp_path / "run")
    before = weights(train(settings, report=quietly))
    final = train(settings, resume=True, report=quietly)
    assert types(final) == {"BF16"}
    assert_same(final, before)


# What a published config.json holds that this package does not compute with, or computes with under another name
FOREIGN = {
    "bos_token_id": 3,
    "force_sample": True,
    "mm_vision_tower": "somebody/another-tower",
    "mm_vision_select_feature": "patch",
    "mm_vision_tower_lr": 2e-06,
    "vision_tower_pretrained": None,
    "tokenizer_padding_side": "right",
    "add_time_instruction": True,
    "architectures": ["SomebodysModel"],
    "model_type": "somebodys",
}


def test_the_published_layout_keeps_the_fields_of_its_source_and_loads(tmp_path):
    """Where the tower is not the 8B's too: that of this model is much smaller."""
    convert(source(tmp_path / "ours", torch.bfloat16), tmp_path / "published", "published")
    path = tmp_path / "published" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **FOREIGN}))
    stage = Stage("a", 1e-2, PICTURES, 2)
    settings = from_source(
        tmp_path / "published", tmp_path / "run", stages=(stage,), layouts=("vidlada", "published"), new_layers=(1,)
    )
    final = train(settings, report=quietly)
    written = tmp_path / "run" / "model-published"
    stored = json.loads((written / "config.json").read_text())
    assert {name: stored[name] for name in FOREIGN} == FOREIGN
    assert stored["num_hidden_layers"] == 3  # ours, over the source's 2
    assert_same(written, weights(final))
    first, second = (vidlada.load(folder) for folder in (final, written))
    assert first.model.config.vision.to_dict() == second.model.config.vision.to_dict()
    assert first.ask(None, "what ?", gen_length=8).token_ids == second.ask(None, "what ?", gen_length=8).token_ids
    # and once more from there
    again = from_source(written, tmp_path / "again", layouts=("vidlada", "published"))
    train(again, report=quietly)
    stored = json.loads((tmp_path / "again" / "model-published" / "config.json").read_text())
    assert {name: stored[name] for name in FOREIGN} == FOREIGN
    assert_same(tmp_path / "again" / "model-published", weights(written))
