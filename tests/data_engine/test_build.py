"""The long-video data engine against a stub of an OpenAI-compatible endpoint."""

import base64
import fcntl
import json
import re
import signal
import threading
import time

import numpy as np
import openai
import pytest
import yaml
from click.testing import CliRunner
from media import number_of, picture, write_video
from processes import Command
from serve.running import running_server

from vidlada.cli import main
from vidlada.data_engine.endpoints import Endpoint, Segment
from vidlada.data_engine.questions import Candidate, letter_in, with_choices
from vidlada.shapes.dataset import write_dataset
from vidlada.training.data.mixture import read_llava
from vidlada.video import Sampling, sample_frames


@pytest.fixture
def config(tmp_path, stub):
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4", frames=100)
    (videos / "broken.mp4").write_bytes(b"no video")

    def endpoint(model):
        return {"url": f"http://127.0.0.1:{stub.server_port}/v1", "model": model, "timeout": 20}

    values = {
        "videos": str(videos), "output": str(tmp_path / "out" / "long.jsonl"), "segments": 2, "frames": 3, "size": 32,
        "writer": endpoint("writer"), "blind": endpoint("blind"),
        "voters": [endpoint("first"), endpoint("second")], "agreement": 2, "parallel": 1,
    }  # fmt: skip
    path = tmp_path / "build.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def build(config):
    return CliRunner().invoke(main, ["data", "build", str(config)])


@pytest.mark.parametrize("odd", ["\ud83d", "\udcff", "\0", "\ufeff", "\x1b[31m"])
def test_odd_characters_in_replies_are_kept_in_the_audit_file(tmp_path, stub, config, odd):
    """A reply is read for its letter; a question with half a character is none."""
    answer = stub.answer
    stub.answer = lambda body: answer(body) + (odd if body["model"] != "writer" else "")
    result = build(config)
    assert result.exit_code == 0, result.output
    audit = (tmp_path / "out" / "long.audit.jsonl").read_bytes().decode()
    assert json.dumps(odd)[1:-1] in audit
    assert len(read_llava(tmp_path / "out" / "long.jsonl", tmp_path / "videos")) == 2


def test_a_name_that_no_data_file_can_hold_is_refused_before_anyone_is_asked(tmp_path, stub, config):
    (tmp_path / "videos" / "a.mp4").rename(tmp_path / "videos" / "a\udcff.mp4")
    result = build(config)
    assert result.exit_code == 2 and "a byte that is not UTF-8" in result.stderr.splitlines()[-1]
    assert not stub.requests


def test_a_build_keeps_what_needs_the_video_and_has_the_votes(tmp_path, stub, config, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    result = build(config)
    assert result.exit_code == 0, result.output
    output = tmp_path / "out" / "long.jsonl"
    entries = read_llava(output, tmp_path / "videos")
    assert [(entry.questions, entry.answers) for entry in entries] == [(("<image>\nWho waves?",), ("the cook",))] * 2
    assert len({entry.id for entry in entries}) == 2
    audit = [json.loads(line) for line in output.with_suffix(".audit.jsonl").read_text().splitlines()]
    assert [(record["video"], record["segment"]) for record in audit] == [
        ("a.mp4", 0), ("a.mp4", 1), ("broken.mp4", 0), ("broken.mp4", 1),
    ]  # fmt: skip
    assert "broken.mp4" in audit[2]["problem"]
    assert [candidate["verdict"] for candidate in audit[0]["candidates"]] == [
        "kept", "answered without the video", "1 of 2 voters agree",
    ]  # fmt: skip
    roles = [(call["role"], call["model"]) for call in audit[0]["candidates"][0]["calls"]]
    assert roles == [("blind", "blind"), ("voter", "first"), ("voter", "second")]
    for path, authorization, body in stub.requests:
        assert (path, authorization) == ("/v1/chat/completions", "Bearer secret")
        pictures = 0 if isinstance(body["messages"][0]["content"], str) else len(body["messages"][0]["content"]) - 1
        assert pictures == (0 if body["model"] == "blind" else 3)
    assert "secret" not in output.with_suffix(".audit.jsonl").read_text()


def test_a_build_continues_and_asks_nothing_twice(tmp_path, stub, config):
    stub.fail_at = 12  # in the second segment: the first took 1 + 3 × blind + 2 × 2 votes = 8 requests
    result = build(config)
    assert result.exit_code == 1 and "status 401" in result.output and "Traceback" not in result.output
    audit = tmp_path / "out" / "long.audit.jsonl"
    with audit.open("a") as file:
        file.write('{"video": "a.mp4", "segm')  # as a kill leaves it
    stub.fail_at, before = None, len(stub.requests)
    result = build(config)
    assert result.exit_code == 0, result.output
    assert len(stub.requests) - before == 8
    assert len(read_llava(tmp_path / "out" / "long.jsonl")) == 2
    content = audit.read_text()
    assert build(config).exit_code == 0
    assert audit.read_text() == content and len(stub.requests) - before == 8


def audit_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "long.audit.jsonl").read_text().splitlines()]


def test_a_refused_request_is_recorded_and_the_build_goes_on(tmp_path, stub, config):
    write_video(tmp_path / "videos" / "c.mp4", frames=100)
    seen = []

    def refuses(body):
        """The writer's first segment, and the first voter's first question."""
        seen.append(body["model"])
        return (body["model"], seen.count(body["model"])) in (("writer", 1), ("first", 1))

    stub.refuses = refuses
    result = build(config)
    assert result.exit_code == 0, result.output
    words = 'refuses: status 400: { "error": "no" }'
    first, second, *_, last = audit_of(tmp_path)
    assert (first["candidates"], first["refused"], first["problem"]) == ([], True, f"writer {words}")
    assert first["prompt"]
    assert (second["refused"], second["problem"]) == (True, f"first {words}")
    assert [candidate["verdict"] for candidate in second["candidates"]] == [
        f"first {words}", "answered without the video", "1 of 2 voters agree",
    ]  # fmt: skip
    refused = second["candidates"][0]["calls"][-1]
    assert (refused["role"], refused["reply"], refused["agrees"]) == ("voter", "", False) and refused["prompt"]
    assert (last["refused"], last["problem"]) == (False, "")
    assert len(read_llava(tmp_path / "out" / "long.jsonl")) == 2
    before = len(stub.requests)
    assert build(config).exit_code == 0 and len(stub.requests) == before


@pytest.mark.parametrize("refusals", [1, 3, 20])
def test_a_build_of_which_all_is_refused_ends_and_can_be_run_again(tmp_path, stub, config, refusals):
    """The broken video in between neither counts nor breaks the row."""
    write_video(tmp_path / "videos" / "c.mp4", frames=100)
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "refusals": refusals}))
    stub.refuses = lambda body: True
    result = build(config)
    segments = min(refusals, 4)
    assert result.exit_code == 1 and f"{segments} segments in a row were refused" in result.output
    assert len(result.output.splitlines()) == 1 and audit_of(tmp_path) == []
    assert len(stub.requests) == segments
    stub.refuses = lambda body: False
    assert build(config).exit_code == 0
    assert len(read_llava(tmp_path / "out" / "long.jsonl")) == 4


@pytest.fixture
def four_at_once(tmp_path, config):
    """The same build, of three readable videos and a broken one."""
    for name in ("c.mp4", "d.mp4"):
        write_video(tmp_path / "videos" / name, frames=100)
    values = yaml.safe_load(config.read_text())
    path = tmp_path / "four.yaml"
    path.write_text(yaml.safe_dump({**values, "parallel": 4, "output": str(tmp_path / "four" / "long.jsonl")}))
    return path


def test_segments_worked_on_at_once_write_the_same_files(tmp_path, stub, config, four_at_once):
    assert build(config).exit_code == 0
    number, lock, at_once, met = 0, threading.Lock(), [0], threading.Barrier(2)

    def wait(body):
        """The first two meet; then the earlier a request, the longer: what is asked later is answered first."""
        nonlocal number
        with lock:
            number += 1
            own = number
            at_once.append(at_once[-1] + 1)
        if own <= 2:
            met.wait(240)
        time.sleep(0.3 / own)
        with lock:
            at_once.append(at_once[-1] - 1)

    stub.wait = wait
    assert build(four_at_once).exit_code == 0
    for name in ("long.jsonl", "long.audit.jsonl"):
        assert (tmp_path / "four" / name).read_text() == (tmp_path / "out" / name).read_text()
    assert 1 < max(at_once) <= 4


@pytest.mark.slow
def test_an_error_of_one_segment_ends_all_at_once(tmp_path, stub, config, four_at_once):
    """Requests of the others, which are not answered, are not waited for, even of those before it."""
    release, gave_up = threading.Event(), threading.Event()

    def wait(body):
        if "seconds 0 to" in str(body):  # every video's first segment
            release.wait(60) or gave_up.set()
        else:
            stub.fail_at = 1

    stub.wait = wait
    result = build(four_at_once)
    assert not gave_up.is_set()  # the build ended before any of them was answered
    release.set()
    assert result.exit_code == 1 and "status 401" in result.output and "Traceback" not in result.output
    stub.fail_at, stub.wait = None, lambda body: None
    assert build(four_at_once).exit_code == 0 and build(config).exit_code == 0
    for name in ("long.jsonl", "long.audit.jsonl"):
        assert (tmp_path / "four" / name).read_text() == (tmp_path / "out" / name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_build_at_once(tmp_path, stub, config, four_at_once, number):
    """Although no endpoint answers; it then continues to the same files."""
    waiting, release, gave_up = threading.Semaphore(0), threading.Event(), threading.Event()

    def wait(body):
        if len(stub.requests) > 12:
            waiting.release()
            release.wait(300) or gave_up.set()

    stub.wait = wait
    process = Command("data", "build", four_at_once)
    for _ in range(4):
        assert waiting.acquire(timeout=240)
    process.send_signal(number)
    code = process.wait(240)
    assert not gave_up.is_set() and "Traceback" not in process.errors  # it ended before any request was answered
    assert code == {signal.SIGINT: 130, signal.SIGTERM: -signal.SIGTERM}[number]
    release.set()
    stub.wait = lambda body: None
    assert build(four_at_once).exit_code == 0 and build(config).exit_code == 0
    for name in ("long.jsonl", "long.audit.jsonl"):
        assert (tmp_path / "four" / name).read_text() == (tmp_path / "out" / name).read_text()


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405])
def test_what_no_other_request_would_fare_better_with_ends_the_build(tmp_path, stub, config, status):
    stub.fail_at, stub.fail_with = 1, status
    result = build(config)
    assert result.exit_code == 1 and f"status {status}" in result.output and len(stub.requests) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(stub, config, tmp_path, monkeypatch, status):
    waits = []
    monkeypatch.setattr(openai._base_client.time, "sleep", waits.append)
    stub.fail_at, stub.fail_with, stub.headers = 1, status, {"Retry-After": "7"}
    assert build(config).exit_code == 0
    assert len(read_llava(tmp_path / "out" / "long.jsonl")) == 2
    assert [wait for wait in waits if wait != 0.1] == [7]


def test_wrong_builds_are_named(tmp_path, config):
    values = yaml.safe_load(config.read_text())
    for change, match in (
        ({"agreement": 3}, "voters"),
        ({"voter": 1}, "voter: unknown"),
        ({"videos": "x"}, "x is"),
        ({"blind": {"url": "http://x", "model": "m", "prompt": "{question}"}}, "prompt: .*choices"),
        ({"blind": {"url": "localhost:8000/v1", "model": "m"}}, "url: .*no address"),
        ({"blind": {"url": "http://localhost:80000/v1", "model": "m"}}, "url: .*no address"),
        ({"output": str(tmp_path / "out.json")}, r"output: .*\.jsonl"),
        ({"size": 33}, "size: .*multiple of 2"),
        ({"parallel": 0}, "parallel: .*greater than 0"),
    ):
        config.write_text(yaml.safe_dump({**values, **change}))
        result = build(config)
        assert result.exit_code == 2 and re.search(match, result.output), result.output


def test_a_build_is_not_continued_with_other_settings(tmp_path, config):
    assert build(config).exit_code == 0
    audit = tmp_path / "out" / "long.audit.jsonl"
    before = audit.read_text()
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**values, "segments": 4, "agreement": 1}))
    result = build(config)
    assert result.exit_code == 2 and "other settings: agreement, segments" in result.output
    values["voters"][0]["tries"] = 9
    config.write_text(yaml.safe_dump(values))
    assert build(config).exit_code == 0
    assert audit.read_text() == before
    audit.write_text('{"video": "a.mp4"}\n')
    assert build(config).exit_code == 2 and audit.read_text() == '{"video": "a.mp4"}\n'


def test_two_builds_do_not_share_an_output(tmp_path, stub, config):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "long.audit.jsonl").open("a") as audit:
        fcntl.flock(audit, fcntl.LOCK_EX)
        result = build(config)
    assert result.exit_code == 2 and "another build" in result.output and not stub.requests


def test_an_output_that_cannot_be_written_is_named(tmp_path, config):
    (tmp_path / "file").touch()
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**values, "output": str(tmp_path / "file" / "long.jsonl")}))
    result = build(config)
    assert result.exit_code == 1 and "cannot be written" in result.output and "Traceback" not in result.output


def test_letters():
    replies = {
        "B": "B", "B.": "B", "The answer is C": "C", "(D) yes": "D", "none": None, "": None, "b) the": "B",
        "**c**": "C", "A cook waves, so the answer is B": "B", "A cook waves": None, "I think B": "B",
        "Is it A? No.</think>\n\nB": "B",
    }  # fmt: skip
    assert {reply: letter_in(reply) for reply in replies} == replies
    candidate = Candidate("Which?", "right", ["w1", "w2", "w3"])
    letters = set()
    for seed in range(30):
        prompt, letter = with_choices(candidate, Endpoint("http://x", "m"), [seed])
        assert f"{letter}. right" in prompt
        letters.add(letter)
    assert letters == set("ABCD")


# How the shipped model was asked in training.
WORDING = {"prompt": "{question} choices : {choices} . answer with the letter .", "choice": "{letter} {choice}",
           "between": " , "}  # fmt: skip


@pytest.mark.slow
def test_the_shipped_model_votes_on_shapes_videos(tmp_path, stub, monkeypatch):
    """Through vidlada serve, which shows it the segment as a video of a frame a second."""
    questions = write_dataset(tmp_path, "validation", clips=2, seconds=6, size=84)
    entries = [entry for entry in json.loads(questions.read_text()) if entry["choices"]]
    by_video = {}
    for entry in entries:
        right = "ABCDEFGH".index(entry["conversations"][1]["value"])
        by_video.setdefault(entry["video"], []).append(
            {
                "question": entry["conversations"][0]["value"].removeprefix("<image>\n").split(" choices : ")[0],
                "answer": entry["choices"][right],
                "wrong": [choice for number, choice in enumerate(entry["choices"]) if number != right],
            }
        )
    left = [by_video[name] for name in sorted(by_video)]
    monkeypatch.setattr(stub, "answer", lambda body: json.dumps(left.pop(0)) if body["model"] == "writer" else "none")
    with running_server(VIDLADA_API_KEYS="key") as server:
        monkeypatch.setenv("KEY_OF_TINY", "key")
        there = f"http://127.0.0.1:{stub.server_port}/v1"
        voter = {"url": f"{server.url.rstrip('/')}/v1", "model": "tiny", "key_variable": "KEY_OF_TINY",
                 "shown": "video", **WORDING}  # fmt: skip
        values = {
            "videos": str(tmp_path / "videos"), "output": str(tmp_path / "out.jsonl"), "segments": 1, "frames": 6,
            "questions": 9, "size": 84, "agreement": 1, "voters": [voter],
            "writer": {"url": there, "model": "writer"}, "blind": {"url": there, "model": "blind"},
        }  # fmt: skip
        (tmp_path / "build.yaml").write_text(yaml.safe_dump(values))
        result = build(tmp_path / "build.yaml")
    assert result.exit_code == 0, result.output
    audit = [json.loads(line) for line in (tmp_path / "out.audit.jsonl").read_text().splitlines()]
    judged = [candidate for record in audit for candidate in record["candidates"]]
    assert len(judged) == len(entries) > 2
    for candidate in judged:
        blind, vote = candidate["calls"]
        assert (blind["agrees"], vote["model"]) == (False, "tiny")
        assert vote["reply"] in list("ABCDEFGH")  # it understood what it was asked, whether it is right or not
        assert candidate["verdict"] == ("kept" if vote["agrees"] else "0 of 1 voters agree")
    kept = sum(candidate["verdict"] == "kept" for candidate in judged)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == kept


def test_a_segment_as_a_video(tmp_path):
    frames = np.stack([picture(number, 96, 96) for number in range(4)])
    (part,) = Segment(frames, (10.0, 18.0)).parts("video")
    kind, content = part["video_url"]["url"].split(";base64,")
    assert kind == "data:video/mp4"
    (tmp_path / "a.mp4").write_bytes(base64.b64decode(content))
    found = sample_frames(tmp_path / "a.mp4", Sampling(fps=0.5))
    assert [number_of(image) for image in found.images] == [0, 1, 2, 3]
    assert found.times == (0, 2, 4, 6)
