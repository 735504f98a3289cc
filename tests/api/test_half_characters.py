"""Halves of characters (lone surrogates) and bytes in no encoding, in every text that enters: one line of refusal."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media import write_video

import vidlada
from vidlada.cli import main
from vidlada.errors import InputError
from vidlada.evaluation.answering import Answerer, Question
from vidlada.generation import GenerationSettings
from vidlada.video import Sampling

SHORT = {"gen_length": 4, "block_length": 4}
QUESTION = "is it red ?"
ENTRIES = {
    "question": lambda model, text: model.ask(None, text, **SHORT),
    "one of many": lambda model, text: model.ask_many([(None, QUESTION), (None, text)], **SHORT),
    "stream": lambda model, text: list(model.stream(None, text, **SHORT)),
    "turn": lambda model, text: model.chat(None, **SHORT).ask(text),
    "choice": lambda model, text: model.ask(None, QUESTION, ["red", text]),
    "choice of many": lambda model, text: model.ask_many([(None, QUESTION)], [["red", text]]),
    "stop": lambda model, text: model.ask(None, QUESTION, stop=text, **SHORT),
    "stops": lambda model, text: model.ask(None, QUESTION, stop=["end", text], **SHORT),
    "suffix": lambda model, text: model.ask(None, QUESTION, suffix=text, **SHORT),
    "system": lambda model, text: model.ask(None, QUESTION, system=text, **SHORT),
    "cache": lambda model, text: model.ask(None, QUESTION, cache=text, **SHORT),
    "commit": lambda model, text: model.ask(None, QUESTION, commit=text, **SHORT),
    "option": lambda model, text: model.ask(None, QUESTION, **{text: 1}),
    "path": lambda model, text: model.ask(f"nowhere{text}.mp4", QUESTION, **SHORT),
    "address": lambda model, text: model.ask(f"http://127.0.0.1:9/{text}", QUESTION, **SHORT),
    "message": lambda model, text: model.complete([{"role": "user", "content": text}], **SHORT),
    "part": lambda model, text: model.complete(
        [{"role": "user", "content": [{"type": "text", "text": text}]}], **SHORT
    ),
    "earlier answer": lambda model, text: model.complete(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}, {"role": "user", "content": "q"}],
        **SHORT,
    ),
    "role": lambda model, text: model.complete([{"role": text, "content": "q"}], **SHORT),
    "processor": lambda model, text: model.processor([{"role": "user", "content": text}]),
    "model": lambda model, text: vidlada.load(f"nowhere/{text}"),
    "adapter": lambda model, text: vidlada.load(adapter=f"nowhere{text}"),
    "type": lambda model, text: vidlada.load(dtype=text),
}
HALVES = st.builds(
    "".join, st.tuples(st.text(max_size=5), st.characters(categories=["Cs"]), st.text(max_size=5))
).filter(lambda text: text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore") != text)


@pytest.mark.parametrize("entry", ENTRIES)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=HALVES)
def test_every_entry_of_python_refuses(small, entry, text):
    with pytest.raises(InputError) as refused:
        ENTRIES[entry](small, text)
    str(refused.value).encode(errors="backslashreplace")


@pytest.mark.parametrize("value", [b"is it \xff ?", 5, ["red ?"], [b"red ?"], {"red": 1}])
@pytest.mark.parametrize(
    "entry", ["question", "one of many", "stream", "turn", "choice", "suffix", "system", "message", "part"]
)
def test_what_is_no_text_is_refused(small, entry, value):
    with pytest.raises(InputError, match="must be "):
        ENTRIES[entry](small, value)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=HALVES)
def test_evaluation_loses_only_the_question(small, text):
    decoding = GenerationSettings(**SHORT)
    questions = [Question(QUESTION, None, decoding), Question(text, None, decoding),
                 Question(QUESTION, None, decoding, ("red", text))]  # fmt: skip
    good, *bad = Answerer(small, Sampling(), 3).replies(questions)
    assert good.error is None and all(" at position " in reply.error for reply in bad)


@pytest.mark.parametrize("text", ["\ud83d", "red\udcff"])
@pytest.mark.parametrize("option", ["question", "--stop", "--suffix", "--system", "--cache", "--choices", "--model"])
def test_the_command_line_refuses_in_a_line(small_folder, tmp_path, option, text):
    video = str(write_video(tmp_path / "clip.mp4", frames=10))
    arguments = ["ask", video, text] if option == "question" else ["ask", video, QUESTION, option, f"red,{text}"]
    model = [] if option == "--model" else ["--model", str(small_folder)]
    result = CliRunner().invoke(main, [*arguments, *model, "--frames", "2", "--gen-length", "4"])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.exception
    assert result.stderr.splitlines()[-1].lower().startswith("error: ")


def test_chat_refuses_bytes_in_no_encoding_and_goes_on(small_folder, tmp_path):
    video = str(write_video(tmp_path / "clip.mp4", frames=10))
    arguments = ["chat", video, "--model", str(small_folder), "--frames", "2", "--gen-length", "4"]
    result = CliRunner().invoke(main, arguments, input=io.BytesIO(b"is it \xff red ?\nis it red ?\n"))
    assert result.exit_code == 2 and "a byte that is not UTF-8" in result.stderr
    assert result.stderr.count("error: ") == 1 and len(result.stdout.splitlines()) == 1


@pytest.mark.slow
def test_a_batch_loses_only_the_line(small_folder, tmp_path):
    """Which keeps its id; the error names the text."""
    lines = [b'{"id": 0, "question": "is it red ?"}', b'{"id": 1, "question": "is it \\ud83d ?"}',
             b'{"question": "is \xff ?", "id": 2}', b'{"id": 3, "question": "q", "stop": ["end", "\\ud83d"]}',
             b'{"id": 4, "question": "q", "video": "\\udcff.mp4"}', b'{"id": 5, "question": "q", "\\ud83d": 1}',
             b'{"id": "a\\ud83d", "question": "q"}', b'{"id": 7, "question": "\xef\xbf\xbd?"}']  # fmt: skip
    (tmp_path / "q.jsonl").write_bytes(b"\n".join(lines))
    arguments = ["batch", tmp_path / "q.jsonl", "--out", tmp_path / "a.jsonl", "--model", small_folder]
    result = CliRunner().invoke(main, [*map(str, arguments), "--gen-length", "4"])
    assert result.exit_code == 1, result.output
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [0, 1, 2, 3, 4, 5, "a\ufffd", 7]
    named = [None, "'question' has half", "'question' has a byte that is not UTF-8", "'stop'[1] has half",
             "'video' has a byte", "a name has half", "'id' has half", None]  # fmt: skip
    for answer, name in zip(answers, named, strict=True):
        assert ("error" in answer) == (name is not None) and answer.get("error", "").startswith(name or "")
    again = CliRunner().invoke(main, [*map(str, arguments), "--gen-length", "4"])
    assert "0 lines answered, 8 before" in again.stderr


@pytest.mark.slow
def test_files_whose_names_are_in_no_encoding_are_read(small_folder, tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.mp4"
    shutil.copy(write_video(tmp_path / "clip.mp4", frames=10), name)
    done = subprocess.run(
        [sys.executable, "-m", "vidlada", "ask", name, QUESTION, "--json", "--model", str(small_folder), "--frames",
         "2", "--gen-length", "4"],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert os.fsencode(json.loads(done.stdout.decode())["media"][0]["source"]) == name
