"""Data files as they are met: each form has one meaning, and what has none is one broken sample."""

import gzip
import json

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from trainings import MODEL, batch

from vidlada.cli import main
from vidlada.errors import InputError
from vidlada.training.config import CollateSettings
from vidlada.training.data.check import check_source
from vidlada.training.data.collate import Collator, Part, StepDataset, messages_of
from vidlada.training.data.conversations import Value, entry_of
from vidlada.training.data.llava import LlavaSource
from vidlada.training.data.mixture import read_llava
from vidlada.training.models import new_model

ASKED = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A ball."}]
GOOD = {"id": "good", "conversations": ASKED}
HALF = "\ud83d"  # of an emoji


def turn(speaker, text):
    return {"from": speaker, "value": text}


FORMS = {
    "human and gpt": {"conversations": ASKED},
    "user and assistant": {"conversations": [turn("user", "What?"), turn("assistant", "A ball.")]},
    "role and content": {
        "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A ball."}]
    },
    "parts": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "at?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A ball."}]},
        ]
    },
    "a leading answer": {"conversations": [turn("gpt", "Hello!"), *ASKED]},
    "a trailing question": {"conversations": [*ASKED, turn("human", "And then?")]},
    "an empty video": {"video": "", "conversations": ASKED},
    "no image": {"image": None, "conversations": ASKED},
}


@pytest.mark.parametrize("value", FORMS.values(), ids=FORMS.keys())
def test_every_form_has_one_meaning(tmp_path, value):
    entry = entry_of(Value("entry 0", value), tmp_path, "d.json")
    assert (entry.problem, entry.questions, entry.answers, entry.media) == ("", ("What?",), ("A ball.",), ())


def test_a_system_turn_is_the_system_message(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"conversations": [turn("system", "Be brief."), *ASKED]}]))
    (sample,) = batch(LlavaSource(path, batch_size=1), 0)
    messages = messages_of((), sample.exchanges, sample.system)
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    _, processor = new_model(MODEL, 0)
    texts = []
    for system in (sample.system, None):
        encoded = processor.encode(messages_of((), sample.exchanges, system), (), add_generation_prompt=False)
        texts.append(len(encoded.input_ids))
    step = StepDataset(LlavaSource(path, batch_size=1), Collator(processor, CollateSettings()), 0)[Part(0)]
    assert step["input_ids"].shape[1] == texts[0] > texts[1]


def test_video_marks_are_image_marks(tmp_path):
    value = {"video": "a.mp4", "conversations": [turn("human", "<video>\nWhat?"), ASKED[1]]}
    assert entry_of(Value("", value), tmp_path, "d").questions == ("<image>\nWhat?",)


def user_parts(*parts, **rest):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "A ball."}], **rest}


TEXT = {"type": "text", "text": "What?"}
SHOWN = {
    "one": ([{"type": "video_url", "video_url": {"url": "a.mp4"}}, TEXT], ["a.mp4"], "<image>\nWhat?"),
    "behind": ([TEXT, {"type": "image_url", "image_url": {"url": "file:///d/a.png"}}], ["/d/a.png"], "What?<image>\n"),
    "two": (
        [{"type": "image", "image": "a.png"}, TEXT, {"type": "video", "video": "b.mp4"}],
        ["a.png", "b.mp4"],
        "<image>\nWhat?<image>\n",
    ),
}


@pytest.mark.parametrize(("parts", "media", "text"), SHOWN.values(), ids=SHOWN.keys())
def test_media_in_parts(tmp_path, parts, media, text):
    entry = entry_of(Value("entry 0", user_parts(*parts)), tmp_path, "d")
    assert (entry.problem, entry.questions) == ("", (text,))
    assert entry.media == tuple(tmp_path / path for path in media)


def test_parts_show_what_the_entry_names(tmp_path):
    entry = entry_of(Value("entry 0", user_parts({"type": "image"}, TEXT, images=["a.png"])), tmp_path, "d")
    assert (entry.problem, entry.media, entry.questions) == ("", (tmp_path / "a.png",), ("<image>\nWhat?",))


def test_parts_are_rendered_as_at_inference(tmp_path):
    """Training puts the same text around the media as a conversation of the same parts gets."""
    _, processor = new_model(MODEL, 0)
    for parts, media, _ in SHOWN.values():
        entry = entry_of(Value("entry 0", user_parts(*parts)), tmp_path, "d")
        trained = messages_of((1,) * len(media), [(entry.questions[0], "A ball.")])
        kinds = [{"type": part["type"].removesuffix("_url")} if part is not TEXT else TEXT for part in parts]
        if len(media) == 1:  # a single one goes in front
            kinds.sort(key=lambda part: part is TEXT)
        expected = [{"role": "user", "content": kinds}, trained[1]]
        assert processor.apply_chat_template(trained) == processor.apply_chat_template(expected)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": ""}}, {"type": "text"}, "What?", None, {"text": "What?"},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image_url", "image_url": {"url": 3}}, {"type": "video_url", "video_url": {"url": HALF}},
    ],
)  # fmt: skip
def test_parts_without_a_meaning_are_one_broken_sample(tmp_path, part):
    assert "messages[0]" in entry_of(Value("entry 0", user_parts(part, TEXT)), tmp_path, "d").problem


LINES = "".join(json.dumps({**GOOD, "id": str(number)}) + "\n" for number in range(3))
LIST = json.dumps([json.loads(line) for line in LINES.splitlines()], indent=1)
FILES = {
    "d.json": LIST.encode(),
    "d.jsonl": LINES.encode(),
    "lines.json": LINES.encode(),
    "list.jsonl": LIST.encode(),
    "D.JSONL": LINES.encode(),
    "mark.json": LIST.encode("utf-8-sig"),
    "mark.jsonl": LINES.encode("utf-8-sig"),
    "d.json.gz": gzip.compress(LIST.encode()),
    "d.jsonl.gz": gzip.compress(LINES.encode()),
    "windows.json": LIST.replace("\n", "\r\n").encode("utf-16"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_read_by_its_content(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert [entry.id for entry in read_llava(tmp_path / name)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "content", [b"[]", b"", b"[{}, {}", b"[{}] x", b"text", gzip.compress(b"[]", mtime=0)[:-9], b"[" * 9999]
)
def test_files_without_entries_are_refused(tmp_path, content):
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(InputError, match="d.json"):
        read_llava(tmp_path / "d.json")


BROKEN = [
    b"{",
    b"[]",
    b"3",
    b"null",
    b'{"conversations": "text"}',
    b'{"conversations": [null]}',
    b'{"conversations": [{"from": "user", "value": "q"}, {"from": "user", "value": "q"}]}',
    b'{"conversations": [{"from": "nobody", "value": "q"}, {"from": "gpt", "value": "a"}]}',
    b'{"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "a"}]}',
    b'{"conversations": [{"from": "human", "value": "q"}]}',
    b'{"conversations": [{"from": "human", "value": "q\\ud83d"}, {"from": "gpt", "value": "a"}]}',
    b'{"conversations": [{"from": "human", "value": "q\xff"}, {"from": "gpt", "value": "a"}]}',
    b'{"video": "a\\u0000.mp4", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}',
    b'{"video": {}, "image": [""], "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}',
    b"[" * 9999,
]


def test_what_has_no_meaning_is_one_broken_sample(tmp_path):
    good = json.dumps(GOOD).encode()
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join([good, *BROKEN, good]))
    _, processor = new_model(MODEL, 0)
    source = LlavaSource(path, batch_size=len(BROKEN) + 2)
    report = check_source("a", source, processor)
    found = report.problems["malformed entries"]
    assert [line.split(":")[1].strip() for line in found] == [
        f"entry {number}, line {number + 1}" for number in range(1, len(BROKEN) + 1)
    ]
    report.text().encode()  # can be printed
    step = StepDataset(source, Collator(processor, CollateSettings()), 0)[Part(0)]
    assert step["weight"] == 1
    assert {line.split(": ")[1] for line in step["skipped"]} >= {line.split(": ")[1] for line in found}


def test_data_check_prints_all_of_them(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([GOOD, *[{"conversations": [HALF]}] * 30], indent=1))
    stage = {"name": "only", "learning_rate": 1e-3, "epochs": 1}
    stage["data"] = {"kind": "llava", "json_path": str(tmp_path / "d.json")}
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"output": str(tmp_path / "run"), "model": MODEL, "stages": [stage]})
    )
    result = CliRunner().invoke(main, ["data", "check", str(tmp_path / "run.yaml")])
    assert result.exit_code == 1, result.output
    assert "malformed entries: 30" in result.output and "entry 30, line" in result.output


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just(HALF)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["id", "video", "image", "conversations", "messages", "from", "role", "value", "process"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=9,
)


@given(JSON, st.sampled_from(["question", "answer", "process", "video", "id", "system"]), st.text(max_size=3))
def test_no_value_ends_the_reading(tmp_path_factory, value, place, text):
    """Whatever JSON says; and half a character anywhere breaks its entry alone."""
    folder = tmp_path_factory.getbasetemp()
    entry_of(Value("entry 0", value), folder, "d.json")
    half = text + HALF
    turns = [turn("human", half if place == "question" else "q"), turn("gpt", half if place == "answer" else "a")]
    if place == "system":
        turns = [turn("system", half), *turns]
    whole = {"conversations": turns} | ({place: half} if place in ("process", "video", "id") else {})
    assert "half a character" in entry_of(Value("entry 0", json.loads(json.dumps(whole))), folder, "d.json").problem
