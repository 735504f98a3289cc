"""Run descriptions: the shipped one, what is refused, and the learning rate over a run."""

import subprocess
import sys
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from click.testing import CliRunner
from pydantic import TypeAdapter

from vidlada.cli import main
from vidlada.errors import InputError
from vidlada.training.config import CONFIGS, CollateSettings, Evaluation, Lora, Stage, TrainingConfig, load_config
from vidlada.training.data.llava import LlavaSource
from vidlada.training.data.shapes import ShapesSource
from vidlada.training.models import initial_config
from vidlada.training.parallel import make_accelerator
from vidlada.training.stages import make_source, prepare_run

TINY = CONFIGS / "tiny.yaml"


def write(folder, stage=None, **changes):
    """A run description with some entries replaced; None leaves an entry out."""
    first = {"name": "a", "steps": 10, "learning_rate": 0.1, "data": {"kind": "shapes"}, **(stage or {})}
    values = {"output": "out", "model": {}, "stages": [first], **changes}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    return path


def test_the_shipped_run():
    config = load_config(TINY, output="elsewhere")
    written = yaml.safe_load(TINY.read_text())
    assert config.output == "elsewhere"
    assert load_config(TINY).output == written["output"]
    assert [stage.name for stage in config.stages] == [stage["name"] for stage in written["stages"]]
    assert config.total_steps == sum(stage["steps"] for stage in written["stages"])
    assert config.stages[-1].collate.end_slots == written["stages"][-1]["collate"]["end_slots"]
    for stage in config.stages:
        assert len(make_source(stage.data, 0, stage.name).plan(0)) > 1


REFUSED = {
    "unknown": {"log_evry": 1, "match": "log_evry: unknown entry; did you mean log_every"},
    "unknown in a stage": {"stage": {"step": 1}, "match": r"stages\[0\].*step\b"},
    "unknown in collate": {"stage": {"collate": {"force": 1}}, "match": r"stages\[0\]\.collate.*force\b"},
    "no output": {"output": None, "match": "output"},
    "no stages": {"stages": [], "match": "stages"},
    "stages of text": {"stages": ["a"], "match": r"stages\[0\]"},
    "no origin": {"model": None, "match": "model"},
    "checkpoint_every": {"checkpoint_every": 0},
    "keep_checkpoints": {"keep_checkpoints": 0},
    "log_every": {"log_every": -1},
    "steps": {"stage": {"steps": 0}, "match": "steps"},
    "learning_rate": {"stage": {"learning_rate": -1.0}, "match": "learning_rate"},
    "schedule": {"stage": {"schedule": "step"}, "match": "schedule"},
}
REFUSED |= {
    "precision": {"precision": "float8", "match": "precision"},
    "workers": {"workers": -1, "match": "workers"},
    "warmup_steps": {"warmup_steps": "few", "match": "warmup_steps"},
    "checkpoint_every": {"checkpoint_every": "often", "match": "checkpoint_every"},
    "stages": {"stages": 5, "match": "stages"},
    "steps": {"stage": {"steps": 1.5}, "match": "steps"},
    "end_targets": {"stage": {"collate": {"end_targets": -5}}, "match": "end_targets"},
    "data": {"stage": {"data": 5}, "match": "data"},
    "a rate of a frozen part": {
        "stage": {"frozen": ["tower"], "tower_learning_rate": 1e-5},
        "match": "tower is frozen; leave tower_learning_rate out",
    },
    "a rate of what adapters freeze": {
        "stage": {"projector_learning_rate": 1e-5}, "model": None, "init_from": "x", "lora": {"train_projector": False},
        "match": "lora freezes the projector; leave projector_learning_rate out",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    changes = dict(REFUSED[case])
    match = changes.pop("match", next(iter(changes)))
    with pytest.raises(InputError, match=match):
        load_config(write(tmp_path, **changes))


def test_numbers_as_yaml_writes_them(tmp_path):
    """YAML reads 1e-3 as text."""
    (stage,) = load_config(write(tmp_path, stage={"learning_rate": "1e-3"})).stages
    assert stage.learning_rate == 1e-3


FIRST_LINE = """
import sys, click
from vidlada.cli import main

def echo(message, **options):
    print(message, "torch" in sys.modules, "transformers" in sys.modules)
    sys.exit()

click.echo = echo
main(["train", sys.argv[1]])
"""


def test_the_first_line_does_not_wait_for_torch(tmp_path):
    path = str(write(tmp_path))
    ended = subprocess.run([sys.executable, "-c", FIRST_LINE, path], capture_output=True, text=True, timeout=120)
    assert ended.stdout == f"reading {path} and its data False False\n", ended.stderr


@pytest.mark.parametrize("text", ["a: [", "- 1", ""])
def test_malformed_files_are_named(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="run.yaml"):
        load_config(path)


def test_a_binary_file_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="run.yaml"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="none.yaml"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("data", "match"),
    [({}, "data: kind"), ({"kind": "movies"}, "movies"), ({"kind": "shapes", "speed": 1}, "speed")],
)
def test_sources_are_refused_by_name(data, match):
    with pytest.raises(InputError, match=match):
        make_source(data, 0, "stage a: data")


UNFIT = {
    "no family": ({"families": ["colours"]}, "families.*colours.*did you mean colour"),
    "no clip has one": ({"families": ["order"], "pictures": True}, "supports a question of order"),
    "longest first": ({"seconds": [7, 2]}, r"seconds.*\[7, 2\]"),
    "too long": ({"seconds": [2, 1000]}, r"seconds\[1\].*1000"),
    "too many things": ({"max_things": 9}, "max_things.*9"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_impossible_clips_are_refused_before_the_run_starts(case):
    data, match = UNFIT[case]
    with pytest.raises(InputError, match=f"stage a: data: .*{match}"):
        make_source({"kind": "shapes", **data}, 0, "stage a: data")


def test_a_missing_entry_is_named_without_all_the_others(tmp_path):
    with pytest.raises(InputError, match=r"output: missing; outputs: unknown entry; did you mean output\?$"):
        load_config(write(tmp_path, output=None, outputs="out"))


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ({"text_config": {"hidden_sise": 12}}, r"text_config\.hidden_sise: unknown entry; did you mean hidden_size"),
        ({"vision_config": {"patch": 12}}, r"vision_config\.patch: unknown"),
        ({"text_onyl": True}, r"text_onyl: unknown entry; did you mean text_only"),
        ({"text_config": 7}, r"text_config.*7"),
        ({"text_config": {"hidden_size": "wide"}}, "hidden_size.*wide"),
        ({"text_config": {"hidden_size": 7, "num_attention_heads": 2}}, "hidden_size 7 is not divisible"),
        ({"text_config": {"num_attention_heads": 4, "num_key_value_heads": 3}}, "num_key_value_heads 3"),
        ({"vision_config": {"hidden_size": 7, "num_attention_heads": 2}}, "embed_dim must be divisible by num_heads"),
        ({"vision_config": {"image_size": 7, "patch_size": 14}}, "image_size 7 holds no patch"),
        ({"vision_config": {"vision_use_head": True}}, "vision_use_head"),
        ({"newline_position": "row"}, "newline_position.*row"),
        ({"generation": {"gen_lenght": 8}}, "gen_lenght"),
        ({"generation": {"gen_length": 8, "block_length": 3}}, "block_length 3"),
    ],
)
def test_impossible_models_are_refused(tmp_path, model, match):
    with pytest.raises(InputError, match=f"model: .*{match}"):
        initial_config(load_config(write(tmp_path, model=model)))


def test_what_fits_only_a_default_is_refused_by_the_model_itself(tmp_path):
    with pytest.raises(InputError, match="hidden_size 7 is not divisible by num_attention_heads 32"):
        initial_config(load_config(write(tmp_path, model={"text_config": {"hidden_size": 7}})))


def test_small_numbers_are_numbers(tmp_path):
    """YAML 1.1 reads 1e-5 as a text."""
    path = write(tmp_path, model={"text_config": {"rms_norm_eps": 0.5}})
    path.write_text(path.read_text().replace("0.5", "1e-5"))
    assert load_config(path).model == {"text_config": {"rms_norm_eps": 1e-5}}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"log_evry": 1}, "log_evry"),
        ({"stage": {"data": {"kind": "shapes", "familys": []}}}, "did you mean families"),
        ({"stage": {"data": {"kind": "llava", "json_path": "gone.json"}}}, "gone.json"),
        ({"model": None, "init_from": "gone"}, "init_from: gone: no such model folder"),
        ({"optimizer": "muon", "parallel": "fsdp"}, "muon"),
        ({"model": {"text_config": {"hidden_sise": 12}}}, "did you mean hidden_size"),
        ({"model": {"generation": {"gen_lenght": 8}}}, "gen_lenght"),
        ({"model": {"text_only": True}}, "stage a: the model has no vision (text_only)"),
        ({"stage": {"collate": {"pad_targets": True}}}, "stage a: pad_targets needs a row for every sample"),
        ({"evaluation": {"data": {"kind": "shapes"}, "collate": {"pad_targets": True}}}, "evaluation: pad_targets"),
        ({"output": "run.yaml"}, "is a file"),
        ({"output": "run", "model": None, "init_from": "run/model"}, "lies in the run's own output, run;"),
    ],
)
def test_wrong_configs_are_one_line(tmp_path, monkeypatch, changes, match):
    path = write(tmp_path, **changes)
    (tmp_path / "run" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(main, ["train", str(path)])
    *first, error_line = ended.stderr.splitlines()
    assert ended.exit_code == 2 and error_line.startswith("error: ") and match in error_line
    assert len(first) <= 1  # what is being read


@pytest.mark.parametrize(("options", "match"), [([], "is not empty"), (["--resume"], "no checkpoint")])
def test_an_output_that_cannot_be_used_is_one_line(tmp_path, options, match):
    (tmp_path / "notes.txt").write_text("mine")
    ended = CliRunner().invoke(main, ["train", str(write(tmp_path, output=str(tmp_path))), *options])
    *first, error_line = ended.stderr.splitlines()
    assert ended.exit_code == 2 and error_line.startswith("error: ") and match in error_line
    assert len(first) <= 1  # what is being read


@pytest.mark.parametrize(
    ("setting", "value", "package"), [("parallel", "zero3", "deepspeed"), ("tracker", "wandb", "wandb")]
)
def test_a_missing_package_is_named(monkeypatch, setting, value, package):
    monkeypatch.setattr("vidlada.training.stages.find_spec", lambda name: None)
    settings = {"tracker": "none", setting: value}
    with pytest.raises(InputError, match=f"{setting}: {value} needs {package}.*pip install {package}"):
        prepare_run(TrainingConfig("out", (Stage("a", 1.0, {"kind": "shapes"}, 1),), model={}, **settings))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("changes", [{}, {"lora": Lora(), "model": None, "init_from": "tiny"}, {"parallel": "fsdp"}])
def test_fp16_is_refused_without_a_gpu(changes):
    settings = {"model": {}, "precision": "fp16", **changes}
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        make_accelerator(TrainingConfig("out", (Stage("a", 1.0, {"kind": "shapes"}, 1),), **settings))


def run(**changes):
    stages = (Stage("a", 1.0, {}, 4), Stage("b", 0.5, {}, 8, final_learning_rate=0.1, **changes))
    return TrainingConfig("out", stages, model={}, warmup_steps=2)


def test_stages_at_their_boundaries():
    config = run()
    found = [(stage.name, within) for stage, within in map(config.stage_at, range(config.total_steps))]
    assert found == [("a", n) for n in range(4)] + [("b", n) for n in range(8)]
    with pytest.raises(InputError, match="past the end"):
        config.stage_at(12)


def test_learning_rate_at_boundaries():
    linear, cosine = run(), run(schedule="cosine")
    assert [linear.learning_rate(step) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]  # warm-up of two steps
    for config in (linear, cosine):
        assert config.learning_rate(4) == pytest.approx(0.5)
        assert config.learning_rate(8) == pytest.approx(0.3)
    assert linear.learning_rate(6) == pytest.approx(0.4)
    assert cosine.learning_rate(6) == pytest.approx(0.5 - 0.4 * (1 - 2**-0.5) / 2)
    assert linear.learning_rate(11) == pytest.approx(0.15)


@pytest.mark.parametrize("cls", [TrainingConfig, Stage, Lora, Evaluation, CollateSettings, ShapesSource, LlavaSource])
def test_one_text_is_a_list_of_itself(cls):
    """Wherever a list of texts is asked for."""
    for name, hint in get_type_hints(cls, include_extras=True).items():
        (inner, *_) = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        entry, *rest = get_args(inner) or (None,)
        if get_origin(inner) is tuple and rest == [...] and (entry is str or get_origin(entry) is Literal):
            text = get_args(entry)[0] if get_args(entry) else "clock"
            assert TypeAdapter(hint).validate_python(text) == (text,), name
