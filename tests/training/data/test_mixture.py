"""Data from files: strategies, formats, what is broken, and the command that finds it beforehand."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from media import number_of, write_video
from PIL import Image
from trainings import MODEL, batch

from vidlada.cli import main
from vidlada.errors import InputError
from vidlada.messages import VIDEO_PLACE
from vidlada.training.config import CollateSettings
from vidlada.training.data.check import check_source
from vidlada.training.data.collate import Collator, Part, StepDataset, messages_of
from vidlada.training.data.llava import LlavaSource
from vidlada.training.data.mixture import choose_entries, read_tar
from vidlada.training.data.samples import BrokenMedia
from vidlada.training.models import new_model
from vidlada.video import Sampling


def entry(answer, question="<image>\nWhat is it?", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": answer, "conversations": turns, **more}


def write_json(path, entries):
    path.write_text(json.dumps(entries))
    return path


def answers(source, steps):
    return [sample.exchanges[-1][1] for step in range(steps) for sample in batch(source, step)]


def seeded():
    return np.random.default_rng(0)


STRATEGIES = [
    ("all", range(10)),
    ("first:3", range(3)),
    ("first:25%", range(3)),  # rounded up
    ("end:2", [8, 9]),
    ("end:20%", [8, 9]),
    ("first:1000", range(10)),
    ("first:2,3", [0, 1] * 3),
    ("all,2", list(range(10)) * 2),
]


@pytest.mark.parametrize(("strategy", "expected"), STRATEGIES)
def test_strategies(strategy, expected):
    assert choose_entries(10, strategy, seeded()) == list(expected)


@given(total=st.integers(1, 50), percent=st.integers(0, 100), seed=st.integers(0, 9))
def test_random_takes_entries_once_and_by_seed(total, percent, seed):
    first, again = (choose_entries(total, f"random:{percent}%", np.random.default_rng(seed)) for _ in range(2))
    assert first == again
    assert len(set(first)) == len(first) == -(-total * percent // 100)


@pytest.mark.parametrize("strategy", ["some", "first", "first:x", "last:3", "first:-1", "all:3", "first:3,x"])
def test_unknown_strategies_are_refused(strategy):
    with pytest.raises(InputError, match="sampling_strategy"):
        choose_entries(10, strategy, seeded())


def text_mixture(folder):
    """40 text entries in two files: half of one, and one of the other three times."""
    write_json(folder / "a.json", [entry(f"a{n}", "What?") for n in range(20)])
    (folder / "b.jsonl").write_text("".join(json.dumps(entry(f"b{n}", "What?")) + "\n" for n in range(20)))
    datasets = [
        {"json_path": "a.json", "sampling_strategy": "random:50%"},
        {"json_path": "b.jsonl", "sampling_strategy": "first:1,3"},
    ]
    (folder / "mixture.yaml").write_text(yaml.safe_dump({"datasets": datasets}))
    return folder / "mixture.yaml"


def test_a_mixture_takes_what_its_strategies_say(tmp_path):
    path = text_mixture(tmp_path)
    source, again, other = (LlavaSource(mixture=path, batch_size=13, seed=seed) for seed in (1, 1, 2))
    one_pass = answers(source, source.steps_of(1))
    assert source.steps_of(1) == 1
    assert sorted(one_pass)[-3:] == ["b0"] * 3
    assert len({answer for answer in one_pass if answer.startswith("a")}) == 10
    assert one_pass == answers(again, 1)
    assert set(one_pass) != set(answers(other, 1))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("datasets: []", "datasets"),
        ("datasets: [{json_path: a.json, sampling: all}]", r"datasets\[0\].*sampling: unknown.*sampling_strategy"),
        ("datasets: [{json_path: a.json, sampling_strategy: some}]", "some"),
        ("datasets: [{json_path: gone.json}]", "gone.json"),
        ("datasets: [{json_path: a.json, video_folder: gone}]", "video_folder: .*gone is not a folder"),
        ("other: 1", "datasets"),
    ],
)
def test_wrong_mixtures_are_named(tmp_path, text, match):
    path = tmp_path / "mixture.yaml"
    path.write_text(text)
    write_json(tmp_path / "a.json", [entry("a")])
    with pytest.raises(InputError, match=match):
        LlavaSource(mixture=path)


def test_a_data_file_is_a_mixture_of_itself(tmp_path):
    write_json(tmp_path / "a.json", [entry("a", "What?"), entry("b", "What?")])
    assert sorted(answers(LlavaSource(mixture=tmp_path / "a.json", batch_size=2), 1)) == ["a", "b"]


def test_one_origin_of_data(tmp_path):
    with pytest.raises(InputError, match="one of json_path, mixture"):
        LlavaSource()


def png(colour, kind="png"):
    content = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(content, kind)
    return content.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_webdataset_tars(tmp_path):
    for shard, colour in (("0", "red"), ("1", "blue")):
        members = [
            (f"{shard}1.json", json.dumps(entry(f"{colour} alone")).encode()),
            (f"{shard}1.png", png(colour)),
            (f"{shard}2.1.png", png("black")),
            (f"{shard}2.0.png", png(colour)),
            (f"{shard}2.json", json.dumps(entry(f"{colour} and black")).encode()),
        ]
        write_tar(tmp_path / f"part-{shard}.tar", members)
    source = LlavaSource(tmp_path / "part-*.tar", batch_size=4)
    samples = {sample.exchanges[0][1]: sample.videos for sample in batch(source, 0, 8)}
    assert sorted(samples) == ["blue alone", "blue and black", "red alone", "red and black"]
    assert [video[0, 0].tolist() for video in samples["red and black"]] == [[255, 0, 0], [0, 0, 0]]
    assert samples["blue alone"][0].shape == (20, 30, 3)


def test_a_tar_holds_any_kind_of_image(tmp_path):
    """The same that a folder of frames may hold."""
    kinds = {"bmp": "bmp", "TIFF": "tiff"}
    members = [(f"{name}.json", json.dumps(entry(name)).encode()) for name in kinds]
    members += [(f"{name}.{name}", png("red", kind)) for name, kind in kinds.items()]
    source = LlavaSource(write_tar(tmp_path / "part.tar", members), batch_size=2)
    videos = {sample.exchanges[0][1]: sample.videos for sample in batch(source, 0, 8)}
    assert {name: [frames.shape for frames in each] for name, each in videos.items()} == dict.fromkeys(
        kinds, [(20, 30, 3)]
    )


def test_several_images_of_a_tar_are_in_order(tmp_path):
    """As the entry names them, else by their numbers."""
    colours = {10: "red", 9: "blue", 2: "lime"}
    members = [(f"{key}.{number}.png", png(colour)) for key in "ab" for number, colour in colours.items()]
    members += [("a.json", json.dumps(entry("a")).encode())]
    members += [("b.json", json.dumps(entry("b", image=["b.9.png", "b.10.png", "b.2.png"])).encode())]
    source = LlavaSource(write_tar(tmp_path / "part.tar", members), batch_size=2)
    videos = {sample.exchanges[0][1]: sample.videos for sample in batch(source, 0, 8)}
    seen = {name: [video[0, 0].tolist() for video in each] for name, each in videos.items()}
    red, blue, lime = [255, 0, 0], [0, 0, 255], [0, 255, 0]
    assert seen == {"a": [lime, blue, red], "b": [blue, red, lime]}


def test_an_image_is_one_frame_however_many_are_taken_of_videos(tmp_path, small):
    (tmp_path / "a.png").write_bytes(png("red"))
    path = write_json(tmp_path / "d.json", [entry("red", image="a.png")])
    source = LlavaSource(path, batch_size=1, sampling=Sampling(max_frames=8, force_sample=True))
    (sample,) = batch(source, 0, 8)
    assert [video.shape for video in sample.videos] == [(20, 30, 3)]
    (length,) = check_source("a", source, small.processor).lengths
    assert length == Collator(small.processor, CollateSettings())([sample], seeded())["labels"].shape[1]


def test_tars_of_videos(tmp_path, small):
    video = write_video(tmp_path / "a.mp4", frames=100).read_bytes()
    members = []
    for name, content in (("1", video), ("2", video[:500])):
        members += [(f"{name}.json", json.dumps(entry(name)).encode()), (f"{name}.mp4", content)]
    source = LlavaSource(write_tar(tmp_path / "a.tar", members), batch_size=2, time_instruction=True)
    whole, damaged = sorted(source.plan(0), key=lambda item: item.exchanges[0][1])
    sample = source.load(whole, 96)
    assert [number_of(frame) for frame in sample.videos[0]] == [0, 25, 50, 75]
    assert "4 frames" in sample.exchanges[0][0]
    with pytest.raises(BrokenMedia, match=r"a\.tar:2\.mp4"):
        source.load(damaged, 96)
    report = check_source("a", source, small.processor, 2)
    assert len(report.lengths) == 1 and "a.tar:2.mp4" in report.text(9)


@pytest.mark.parametrize(
    ("members", "match"),
    [([("1.png", b"")], "needs one json"), ([("1.json", b"{")], "not valid json"), ([("1.json", b"[]")], "mapping")],
)
def test_wrong_tars_are_named(tmp_path, members, match):
    with pytest.raises(InputError, match=match):
        read_tar(write_tar(tmp_path / "a.tar", members))
    (tmp_path / "b.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(InputError, match=r"b\.tar"):
        read_tar(tmp_path / "b.tar")


def test_images_stand_at_their_marks(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        (tmp_path / name).write_bytes(png(colour))
    question = "First <image> then <image> which?"
    path = write_json(tmp_path / "d.json", [entry("red", question, image=["a.png", "b.png"])])
    (sample,) = batch(LlavaSource(path, batch_size=1), 0)
    assert [video[0, 0].tolist() for video in sample.videos] == [[255, 0, 0], [0, 0, 255]]
    user, _ = messages_of([1, 1], sample.exchanges)
    assert [part["type"] for part in user["content"]] == ["text", "video", "text", "video", "text"]
    unmarked, _ = messages_of([1, 1, 1], [(question, "red")])
    assert [part["type"] for part in unmarked["content"]] == ["video"] * 3 + ["text"]
    assert VIDEO_PLACE not in unmarked["content"][-1]["text"]


def test_thinking(tmp_path):
    entries = [entry("yes", "Is it?", process="It looks so."), entry("no", "Is it?")]
    path = write_json(tmp_path / "d.json", entries)
    exchanges = {s.exchanges for s in map(hashable, batch(LlavaSource(path, batch_size=2, think=True), 0))}
    assert exchanges == {
        (("Is it?/think", "<think>It looks so.</think>\nyes"),),
        (("Is it?/no_think", "no"),),
    }
    assert set(answers(LlavaSource(path, batch_size=2), 1)) == {"yes", "no"}


def test_the_think_mark_follows_the_text_without_its_media_mark(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red"))
    path = write_json(tmp_path / "d.json", [entry("red", "Which colour?\n<image>", image="a.png")])
    (sample,) = batch(LlavaSource(path, batch_size=1, think=True), 0)
    user, _ = messages_of([1], sample.exchanges)
    assert [part.get("text") for part in user["content"]] == [None, "Which colour?/no_think"]


def hashable(sample):
    return type(sample)(sample.videos, tuple(sample.exchanges))


def test_batches_of_like_length(tmp_path):
    entries = [entry("x" * length, "What?") for length in np.random.default_rng(0).integers(1, 400, 64).tolist()]
    path = write_json(tmp_path / "d.json", entries)
    spreads, passes = {}, {}
    for grouped in (True, False):
        source = LlavaSource(path, batch_size=4, group_by_length=grouped)
        steps = [[len(sample.exchanges[0][1]) for sample in batch(source, step)] for step in range(16)]
        spreads[grouped] = np.mean([max(step) - min(step) for step in steps])
        passes[grouped] = sorted(sum(steps, []))
        assert [len(s.exchanges[0][1]) for s in batch(source, 16)] != steps[0]  # the next pass is another order
    assert spreads[True] < spreads[False] / 5
    assert passes[True] == passes[False]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Six entries: a good clip twice, one missing, one damaged, one too long, one whose answer is empty."""
    folder = tmp_path_factory.mktemp("broken")
    write_video(folder / "good.mp4", frames=50)
    (folder / "bad.mp4").write_bytes(b"not a video")
    entries = [
        entry("one", video="good.mp4"),
        entry("gone", video="gone.mp4"),
        entry("bad", video="bad.mp4"),
        entry("one", "Something else?"),
        entry("long", "What " * 600, video="good.mp4"),
        entry("", "Empty?"),
    ]
    return write_json(folder / "d.json", entries)


def test_broken_samples_are_replaced_and_told(broken):
    _, processor = new_model(MODEL, 0)
    source = LlavaSource(broken, batch_size=6)
    bad = next(item for item in source.plan(0) if item.exchanges[0][1] == "bad")
    with pytest.raises(BrokenMedia, match="bad.mp4"):
        source.load(bad, 56)
    dataset = StepDataset(source, Collator(processor, CollateSettings()), 0)
    whole = dataset[Part(0)]
    assert whole["weight"] == 1 and whole["total_samples"] == int(whole["sample_index"].max()) + 1 == 6
    problems = " ".join(whole["skipped"])
    assert "gone.mp4" in problems and "bad.mp4" in problems and "more than the model's" in problems
    assert "d.json: entry 5, line 1: every answer is empty" in problems
    assert dataset[Part(0)]["skipped"] == whole["skipped"]
    parts = [dataset[Part(0, number, 3)] for number in range(3)]
    assert [part["first_sample"] for part in parts] == [0, 2, 4]


def test_what_is_too_long_is_skipped_by_its_name(tmp_path):
    """Even if all there is is too long."""
    _, processor = new_model(MODEL, 0)
    path = write_json(tmp_path / "d.json", [entry("long", "What " * 600)])
    stuck = StepDataset(LlavaSource(path, batch_size=2), Collator(processor, CollateSettings()), 0)[Part(0)]
    assert stuck["weight"] == 0 and stuck["total_samples"] == int(stuck["sample_index"].max()) + 1 == 2
    assert "d.json: entry 0, line 1: the conversation has" in stuck["skipped"][0]


def test_nothing_usable_keeps_the_process_in_step(tmp_path):
    _, processor = new_model(MODEL, 0)
    path = write_json(tmp_path / "d.json", [entry("gone", video="gone.mp4")])
    stuck = StepDataset(LlavaSource(path, batch_size=1), Collator(processor, CollateSettings(), 56), 0)[Part(0)]
    assert stuck["weight"] == 0 and len(stuck["skipped"]) > 1
    assert stuck["media_shapes"] == [1] and not stuck["attention_mask"].all()


def write_config(folder, data, **more):
    stage = {"name": "only", "learning_rate": 1e-3, "epochs": 1, "data": {"kind": "llava", "batch_size": 2, **data}}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / "run"), "model": MODEL, "stages": [stage], **more}))
    return path


def test_data_check(broken, tmp_path):
    path = write_config(tmp_path, {"json_path": str(broken), "sampling": {"fps": 5}})
    result = CliRunner().invoke(main, ["data", "check", str(path)])
    assert result.exit_code == 1, result.output
    for line in ("only: 6 entries", "duplicate ids: 1", "missing files: 1", "unreadable files: 1", "too long: 1",
                 "without labels: 1", "tokens: median"):  # fmt: skip
        assert line in result.output
    (found,) = json.loads(CliRunner().invoke(main, ["data", "check", "--json", str(path)]).output)
    assert len(found["lengths"]) == 3
    assert "entry 1" in found["problems"]["missing files"][0]


def run_check(path):
    result = CliRunner().invoke(main, ["data", "check", "--json", str(path)])
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)


def test_data_check_looks_at_the_evaluation_too(broken, tmp_path):
    write_json(tmp_path / "d.json", [entry("a", "What?")])
    evaluation = {"data": {"kind": "llava", "json_path": str(broken)}}
    only, held_out = run_check(write_config(tmp_path, {"json_path": str(tmp_path / "d.json")}, evaluation=evaluation))
    assert not only["problems"] and held_out["stage"] == "evaluation"
    assert "gone.mp4" in held_out["problems"]["missing files"][0]


def test_data_check_finds_files_that_only_look_whole(tmp_path):
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)).save(noise, "png")
    (tmp_path / "cut.png").write_bytes(noise.getvalue()[:5000])
    os.mkfifo(tmp_path / "pipe.mp4")
    unusable = ["cut.png", "pipe.mp4", f"{'n' * 300}.mp4"]
    entries = [entry("a", video=name) for name in unusable] + [entry("b")]
    for number, value in enumerate(entries):
        value["id"] = None if number > 1 else number
    (found,) = run_check(write_config(tmp_path, {"json_path": str(write_json(tmp_path / "d.json", entries))}))
    problems = found["problems"]
    assert {kind: len(lines) for kind, lines in problems.items()} == {"unreadable files": 3, "without media": 1}
    assert all(name in line for name, line in zip(unusable, problems["unreadable files"], strict=True))


def test_data_check_counts_tokens_as_training_does(tmp_path, small):
    write_video(tmp_path / "a.mp4", frames=50)
    path = write_json(tmp_path / "d.json", [entry("yes", video="a.mp4", process="It looks so."), entry("no", "Is it?")])
    for settings in ({}, {"think": True}, {"time_instruction": True}):
        source = LlavaSource(path, batch_size=1, sampling=Sampling(fps=5), **settings)
        collator = Collator(small.processor, CollateSettings())
        trained = [collator([source.load(source.item(n), 28)], seeded())["input_ids"].shape[1] for n in range(2)]
        assert check_source("a", source, small.processor).lengths == trained


def test_data_check_of_good_data(tmp_path):
    write_json(tmp_path / "d.json", [entry(str(n), "What?") for n in range(3)])
    path = write_config(tmp_path, {"json_path": str(tmp_path / "d.json"), "sampling_strategy": "all"})
    result = CliRunner().invoke(main, ["data", "check", str(path)])
    assert result.exit_code == 2 and "sampling_strategy: unknown entry" in result.output
    path = write_config(tmp_path, {"json_path": str(tmp_path / "d.json")})
    result = CliRunner().invoke(main, ["data", "check", str(path)])
    assert result.exit_code == 0, result.output


def test_a_dry_run_resolves_epochs(tmp_path):
    write_json(tmp_path / "d.json", [entry(str(n), "What?") for n in range(7)])
    path = write_config(tmp_path, {"json_path": str(tmp_path / "d.json")})
    result = CliRunner().invoke(main, ["train", "--dry-run", str(path)])
    assert result.exit_code == 0, result.output
    assert "| only | 4 |" in result.output and not (tmp_path / "run").exists()


def test_images_are_tiled_as_at_inference(tmp_path, small, monkeypatch):
    monkeypatch.setattr(small.processor, "image_aspect_ratio", "anyres_max_4")
    monkeypatch.setattr(small.model.config, "image_aspect_ratio", "anyres_max_4")
    (tmp_path / "a.png").write_bytes(png("red"))
    path = write_json(tmp_path / "d.json", [entry("red", "which? <image>", image="a.png")])
    source = LlavaSource(path, batch_size=1)
    batch = StepDataset(source, Collator(small.processor, CollateSettings()), 0)[Part(0)]
    chat = small.chat(str(tmp_path / "a.png"))
    prompt = chat.request("which? <image>").prompt
    (shape,) = batch["media_shapes"]
    assert shape.tiles == len(batch["pixel_values"]) > 1
    visual = torch.cat(small.model.encode_media(batch["pixel_values"], batch["media_shapes"]))
    assert torch.allclose(visual, chat.media[0].visual_tokens, atol=1e-5)
    ids = batch["input_ids"][0].tolist()
    assert torch.allclose(small.model.embed(batch["input_ids"], visual)[0, : len(prompt)], prompt, atol=1e-5)
    assert check_source("a", source, small.processor).lengths == [len(ids)]


def test_samples_longer_than_the_stage_takes_are_skipped(tmp_path, small):
    path = write_json(tmp_path / "d.json", [entry("yes " * 50, "Is it?"), entry("no", "Is it?")])
    collator = Collator(small.processor, CollateSettings(max_length=30))
    step = StepDataset(LlavaSource(path, batch_size=2), collator, 0)[Part(0)]
    assert len(step["skipped"]) >= 1 and "more than the stage's 30" in step["skipped"][0]
    assert step["input_ids"].shape[1] <= 30
