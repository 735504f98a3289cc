"""Whatever stands in a config, a data file or a mixture: a line, or one broken sample; never a trace."""

import json

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from trainings import MODEL

from vidlada.cli import main
from vidlada.errors import InputError
from vidlada.training.config import load_config
from vidlada.training.data.collate import Collator
from vidlada.training.data.llava import LlavaSource
from vidlada.training.data.samples import BrokenMedia
from vidlada.training.models import initial_processor
from vidlada.training.stages import prepare_run

# halves of characters, bytes that are no UTF-8 as Python's file names have them, NULs, control characters, emoji
ODD = st.text(st.characters(), max_size=12) | st.sampled_from(
    ["\ud83d", "a\udc80b", "\0", "a\0b", "\x1b[31m", "😀", "\u202e", "\ufeff", "<image>", "${", "${HOME", "\r\n", ""]
)
PLACES = [
    ("output",), ("name",), ("init_from",), ("vision_tower",), ("precision",), ("model", "system_message"),
    ("model", "newline_position"), ("model", "generation", "suffix"), ("stages", 0, "name"),
    ("stages", 0, "schedule"), ("stages", 0, "data", "kind"), ("stages", 0, "data", "json_path"),
    ("stages", 0, "data", "video_folder"), ("stages", 0, "data", "mixture"),
]  # fmt: skip


def description(folder):
    stage = {
        "name": "a",
        "steps": 1,
        "learning_rate": 0.1,
        "data": {"kind": "llava", "json_path": str(folder / "d.json")},
    }
    return {"output": str(folder / "out"), "model": dict(MODEL), "stages": [stage]}


def put(values, place, text):
    *way, last = place
    for step in way:
        values = values.setdefault(step, {}) if isinstance(values, dict) else values[step]
    values[last] = text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    turns = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]
    (folder / "d.json").write_text(json.dumps([{"conversations": turns}]))
    return folder


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(text=ODD, place=st.sampled_from(PLACES), key=st.booleans())
@example(text="\ud83d", place=("output",), key=False)
@example(text="a\0b", place=("output",), key=False)
@example(text="\udcff", place=("stages", 0, "name"), key=True)
def test_any_text_in_a_config_is_taken_or_refused(folder, text, place, key):
    values = description(folder)
    put(values, (*place[:-1], text) if key else place, "x" if key else text)
    path = folder / "run.yaml"
    path.write_bytes(yaml.dump(values).encode("utf-8", "surrogatepass"))
    try:
        config = load_config(path)
        prepare_run(config)
        initial_processor(config)
    except InputError as error:
        str(error).encode(errors="backslashreplace")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(content=st.binary(max_size=60))
@example(content=b"output: \xff\xfe")
@example(content=b"a: 2026-13-45")
@example(content=b"? [a]\n: b")
@example(content=b"&a [*a]")
@example(content=b"a: &a {b: *a}")
@example(content=b"a: !!python/object:os.system x")
def test_any_bytes_as_a_config_are_refused_in_a_line(folder, content):
    path = folder / "bytes.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError):
        load_config(path)


SAMPLE_PLACES = ["question", "answer", "process", "id", "video", "system"]


@pytest.fixture(scope="module")
def processor(folder):
    path = folder / "whole.yaml"
    path.write_text(yaml.safe_dump(description(folder)))
    return initial_processor(load_config(path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(text=ODD, place=st.sampled_from(SAMPLE_PLACES), escaped=st.booleans())
@example(text="\ud83d", place="answer", escaped=True)
@example(text="\ud83d", place="question", escaped=False)
@example(text="a\0b", place="video", escaped=True)
def test_any_text_in_a_sample_is_taken_or_one_broken_sample(folder, processor, text, place, escaped):
    """Beside a good one, whose file is read all the same."""
    texts = {"question": "what ?", "answer": "red", "system": "be brief", place: text}
    turns = [
        {"from": speaker, "value": texts[name]}
        for speaker, name in (("system", "system"), ("human", "question"), ("gpt", "answer"))
    ]
    good = {"conversations": [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]}
    odd = {"conversations": turns, **{name: text for name in ("id", "process", "video") if name == place}}
    path = folder / "odd.jsonl"
    lines = [json.dumps(entry, ensure_ascii=escaped) for entry in (good, odd)]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    source = LlavaSource(json_path=path, think=True)
    assert len(source.entries) == 2 and not source.entries[0].problem
    collator = Collator(processor, load_config(folder / "whole.yaml").stages[0].collate)
    try:
        collator.check(source.load(source.item(1), 56))
    except BrokenMedia as error:
        assert str(error)
    except InputError as error:
        assert "empty" in str(error) or "tokens" in str(error)


@pytest.mark.parametrize("text", ["half \ud83d", "nul \0"])
def test_the_command_line_names_it(folder, text):
    values = description(folder)
    put(values, ("name",), text)
    path = folder / "named.yaml"
    path.write_text(yaml.dump(values))
    ended = CliRunner().invoke(main, ["train", str(path)])
    assert ended.exit_code == 2 and ended.stderr.splitlines()[-1].startswith("error: ") and "name" in ended.stderr


@pytest.mark.parametrize("name", ["OUTPUT", "VIDEOS"])
def test_bytes_of_the_environment_and_the_command_line_are_refused(folder, monkeypatch, name):
    values = description(folder)
    values["output"] = "${OUTPUT:-out}"
    values["stages"][0]["data"]["video_folder"] = "${VIDEOS:-}"
    path = folder / "variables.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match="output has a byte that is not UTF-8 at position 4"):
        load_config(path, output="runs\udcff")
    monkeypatch.setenv(name, "runs\udcff")
    with pytest.raises(InputError, match="has a byte that is not UTF-8 at position 4"):
        load_config(path)
