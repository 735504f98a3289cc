"""`vidlada batch`: every line answered once, in order, whatever happens."""

import json
import signal
import time

import pytest
from click.testing import CliRunner
from media import write_video
from processes import Command

from vidlada.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    for number in range(3):
        write_video(folder / f"{number}.mp4", frames=50 + 25 * number)
    (folder / "bad.mp4").write_bytes(b"not a video")
    return folder


def write_questions(path, number):
    lines = [
        {"id": i, "video": f"{i % 3}.mp4", "question": f"is it {'red' if i % 2 else 'blue'} ?", "seed": i}
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def run(questions, out, *options):
    done = CliRunner().invoke(main, ["batch", str(questions), "--out", str(out), *map(str, options)])
    return done.exit_code, done.stderr


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_ask(folder, small, small_folder, tmp_path):
    lines = write_questions(folder / "questions.jsonl", 7)
    options = ("--model", small_folder, "--gen-length", 16, "--concurrency", 3)
    code, err = run(folder / "questions.jsonl", tmp_path / "out.jsonl", *options)
    assert (code, err) == (0, "7 lines answered, 0 before; 0 of all 7 are errors\n")
    found = answers(tmp_path / "out.jsonl")
    assert [answer["line"] for answer in found] == list(range(1, 8))
    for line, answer in zip(lines, found, strict=True):
        expected = small.ask(folder / line["video"], line["question"], gen_length=16, seed=line["seed"])
        assert answer["answer"] == expected.text
        assert {name: answer[name] for name in ("id", "video", "question")}.items() <= line.items()
    before = (tmp_path / "out.jsonl").read_bytes()
    code, err = run(folder / "questions.jsonl", tmp_path / "out.jsonl", *options)
    assert (code, err) == (0, "0 lines answered, 7 before; 0 of all 7 are errors\n")
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_thoughts_stand_beside_the_answers(folder, small, small_folder, tmp_path):
    questions = tmp_path / "questions.jsonl"
    lines = [{"question": "is it red ?"}, {"question": "is it red ?", "think": False},
             {"question": "is it red ?", "think_length": 8}]  # fmt: skip
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"gen_length": 8, "think": True, "think_length": 12}
    given = ("--model", small_folder, "--gen-length", 8, "--think", "--think-length", 12)
    assert run(questions, tmp_path / "out.jsonl", *given)[0] == 0
    for line, answer in zip(lines, answers(tmp_path / "out.jsonl"), strict=True):
        expected = small.ask(None, **{**options, **line})
        assert answer["answer"] == expected.text
        assert answer.get("reasoning", "") == expected.reasoning
        assert ("reasoning" in answer) == (line.get("think") is not False)


def test_errors_are_lines(folder, small_folder, tmp_path):
    bad = [
        "{", "[]", "", '{"video": "0.mp4"}', '{"question": "is it red ?", "video": "none.mp4"}',
        '{"question": "is it red ?", "video": "bad.mp4"}', '{"question": "is it red ?", "gen_length": 0}',
        '{"question": "is it red ?", "unknown": 1}', '{"question": ""}', '{"question": "is it \\ud800 ?"}',
        '{"question": "is it red ?", "id": NaN}', '{"question": "is it red ?", "id": "good"}',
    ]  # fmt: skip
    (folder / "bad.jsonl").write_bytes("\n".join(bad).encode() + b"\n\xff\xff\n")
    code, err = run(folder / "bad.jsonl", tmp_path / "out.jsonl", "--model", small_folder, "--gen-length", 16)
    assert code == 1
    assert "13 lines answered, 0 before; 12 of all 13 are errors" in err
    found = answers(tmp_path / "out.jsonl")
    assert [answer["line"] for answer in found] == list(range(1, 14))
    assert ["error" in answer for answer in found] == [True] * 11 + [False, True]
    assert found[11]["id"] == "good"
    again = run(folder / "bad.jsonl", tmp_path / "out.jsonl", "--model", small_folder, "--gen-length", 16)
    assert again == (1, "0 lines answered, 13 before; 12 of all 13 are errors\n")


def test_what_belongs_to_other_questions_is_left_alone(folder, small_folder, tmp_path):
    write_questions(folder / "some.jsonl", 2)
    out = tmp_path / "out.jsonl"
    for content in ('{"line": 1, "id": 0, "video": "x.mp4", "question": "?"}\n', "notes\n", "{}\n" * 3):
        out.write_text(content)
        code, err = run(folder / "some.jsonl", out, "--model", small_folder)
        assert code == 2
        assert "answers no such question" in err
        assert out.read_text() == content
    assert run(tmp_path / "none.jsonl", out)[0] == 2
    assert run(folder / "some.jsonl", tmp_path / "none" / "out.jsonl")[0] == 2


@pytest.mark.slow
def test_killed_and_resumed_nothing_is_lost_or_doubled(folder, small_folder, tmp_path):
    write_questions(folder / "many.jsonl", 40)
    options = ["--model", str(small_folder), "--gen-length", "16", "--concurrency", "2"]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run(folder / "many.jsonl", whole, *options)[0] == 0
    process = Command("batch", folder / "many.jsonl", "--out", out, *options)
    while not out.exists() or out.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # so that it cannot end before the second run meets it
    code, err = run(folder / "many.jsonl", out, *options)
    assert (code, "another run" in err) == (2, True)
    process.kill()
    process.wait()
    out.write_bytes(out.read_bytes() + b'{"line": half a li')
    assert run(folder / "many.jsonl", out, *options)[0] == 0

    def answers_of(path):
        return [(answer["line"], answer["answer"]) for answer in answers(path)]

    assert answers_of(out) == answers_of(whole)
