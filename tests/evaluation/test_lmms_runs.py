"""Whole runs of real, unmodified lmms-eval, offline, on miniature benchmarks, with the model in the package."""

import json
import re
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from miniature import SPOKEN, write_miniatures

import vidlada
from vidlada.cli import main
from vidlada.evaluation.benchmarks import BENCHMARKS, MVBENCH_FOLDERS
from vidlada.evaluation.data import documents, repository_folder
from vidlada.evaluation.folder import LOG_FILE, SUBMISSION_FILE
from vidlada.evaluation.likelihood import negative_log_likelihood
from vidlada.evaluation.results import read_run
from vidlada.evaluation.run import environment
from vidlada.shapes.benchmark import evaluate, read_questions
from vidlada.video import Sampling, sample_frames

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make eval-env")

import lmms_eval
from lmms_eval.utils import get_lmms_eval_cache_version

pytestmark = pytest.mark.slow

FRAMES = 4
BROKEN, MISSING = "videomme/data/clip0000001.mp4", "lvbench/clip1.mp4"
ALL = ",".join(BENCHMARKS)
TASKS = {"_task_utils", "egoschema", "longvideobench", "lvbench", "mlvu", "mvbench", "videomme", "videommmu"}


@pytest.fixture(scope="module", autouse=True)
def fewer_tasks(tmp_path_factory):
    """lmms-eval with the folders of these benchmarks alone: at every start it reads the nearly 2,000 files of all."""
    package = Path(lmms_eval.__file__).parent

    def others(folder, names):
        return [name for name in names if Path(folder) == package / "tasks" and "." not in name and name not in TASKS]

    folder = tmp_path_factory.mktemp("packages")
    shutil.copytree(package, folder / "lmms_eval", ignore=others)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(folder))
        yield


def vidlada_eval(*arguments):
    """The command in this process; it starts lmms-eval in others."""
    done = CliRunner().invoke(main, ["eval", "run", *map(str, arguments)])
    assert done.exit_code == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Every benchmark, with a damaged and a missing video, one in the hub's cache, one's videos behind a link."""
    folder = tmp_path_factory.mktemp("data") / "root"
    write_miniatures(folder, list(BENCHMARKS.values()))
    (folder / BROKEN).write_bytes((folder / BROKEN).read_bytes()[:2000])
    (folder / MISSING).unlink()
    snapshot = folder / "hub/datasets--lmms-eval--LVBench/snapshots/abc"
    snapshot.parent.mkdir(parents=True)
    (folder / "lmms-eval/LVBench").rename(snapshot)
    (folder / "mvbench_video").rename(folder.parent / "elsewhere")
    (folder / "mvbench_video").symlink_to(folder.parent / "elsewhere")
    return folder


def listing(root):
    """Everything below a data root."""
    return {path: path.lstat().st_mtime_ns for path in [*root.rglob("*"), *(root / "mvbench_video").rglob("*")]}


def rows_of(root, repository, config, split):
    """Questions, wherever they lie."""
    return documents(repository_folder(root, repository), config, split)


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A run of everything, with its output."""
    output = tmp_path_factory.mktemp("runs") / "run"
    options = ("--data-root", root, "--frames", FRAMES, "--batch-size", 3, "--device", "cpu")
    before = listing(root)
    printed = vidlada_eval("--tasks", ALL, "--output", output, *options)
    assert listing(root) == before  # nothing is written into the data root
    return output, printed, options


@pytest.fixture(scope="module")
def tiny():
    return vidlada.load("tiny", device="cpu")


def test_every_benchmark_runs(finished):
    output, (printed, err), _ = finished
    run = read_run(output)
    assert list(run.results) == list(BENCHMARKS)
    for name, result in run.results.items():
        assert set(result.tasks) == {task.name for task in BENCHMARKS[name].tasks}
        assert len(result.samples) == (8 if name == "shapes" else 4 * len(result.tasks))
    assert "# tiny" in printed and "report.md" in err
    assert (output / "report.json").exists() and (output / "report.png").exists()


def test_broken_and_missing_videos_cost_their_questions(finished):
    output, (printed, err), _ = finished
    run = read_run(output)
    counts = {name: len(result.failed) for name, result in run.results.items() if result.failed}
    assert counts == {"videomme": 2, "videomme_w_subtitle": 2, "lvbench": 2}
    assert all(sample.points == 0 for result in run.results.values() for sample in result.failed)
    assert "clip0000001.mp4" in printed and "lvbench/clip1.mp4 is not there" in printed
    assert "lvbench: 1 of its videos are missing (e.g. lvbench/clip1.mp4)" in err
    assert {sample.video for sample in run.results["lvbench"].failed} == {MISSING}


def differing(pairs):
    """How many answers of a run, which decodes several at a time, are not those asked alone: other shapes round
    differently, which turns an answer that was nearly another."""
    return sum(sample.answer != answer.text.removesuffix(".").strip() for sample, answer in pairs)


def prompts(root):
    """Task, number, video and the words of a question, put together here from the benchmarks' descriptions."""
    for number, row in enumerate(rows_of(root, "lmms-eval/Video-MME", None, "test")):
        yield "videomme", number, f"videomme/data/{row['videoID']}.mp4", (
            "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
            "Respond with only the letter (A, B, C, or D) of the correct option.\n" + row["question"] + "\n"
            + "\n".join(row["options"]) + "\n\nAnswer with the option's letter from the given choices directly."
        )  # fmt: skip
    for number, row in enumerate(rows_of(root, "sy1998/MLVU_dev", None, "test")):
        yield (
            "mlvu_dev",
            number,
            f"mlvu/{row['video_name']}",
            (row["question"] + "\nOnly give the best option.\nBest option: ("),
        )
    for number, row in enumerate(rows_of(root, "sy1998/MLVU_Test", None, "test")):
        yield "mlvu_test", number, f"mlvu_test/{row['video_name']}", row["question"]
    for number, row in enumerate(rows_of(root, "lmms-eval/LVBench", None, "train")):
        yield (
            "lvbench",
            number,
            f"lvbench/{row['video_path']}",
            (row["question"] + "\nAnswer the question with the option letter"),
        )
    for number, row in enumerate(rows_of(root, "lmms-eval/egoschema", "Subset", "test")):
        yield (
            "egoschema_subset",
            number,
            f"egoschema/videos/{row['video_idx']}.mp4",
            (
                "\n".join([row["question"], *row["option"]])
                + "\nAnswer with the option's letter from the given choices directly."
            ),
        )
    for kind, folder in MVBENCH_FOLDERS.items():
        for number, row in enumerate(rows_of(root, "OpenGVLab/MVBench", kind, "train")):
            listed = "".join(
                f"({letter}) {option}\n" for letter, option in zip("ABCD", row["candidates"], strict=False)
            )
            yield (
                f"mvbench_{kind}",
                number,
                f"mvbench_video/{folder}/{row['video']}",
                (f"Question:{row['question']}\nOption:\n{listed}Only give the best option.\n"),
            )


def test_answers_and_scores_against_asking_directly(root, finished, tiny):
    samples = read_run(finished[0]).samples
    truths = {}
    for repository, task, config, split in (
        ("lmms-eval/Video-MME", "videomme", None, "test"), ("sy1998/MLVU_dev", "mlvu_dev", None, "test"),
        ("sy1998/MLVU_Test", "mlvu_test", None, "test"), ("lmms-eval/LVBench", "lvbench", None, "train"),
    ):  # fmt: skip
        truths |= {(task, n): row["answer"] for n, row in enumerate(rows_of(root, repository, config, split))}
    pairs = []
    for task, number, video, text in prompts(root):
        sample = samples[task, number]
        if sample.error:
            continue
        answer = tiny.ask(
            root / video, text, think=False, frames=FRAMES, gen_length=2, block_length=2, steps=2,
            time_instruction=task.startswith("mvbench"),
        )  # fmt: skip
        pairs.append((sample, answer))
        if (task, number) in truths:
            letters = re.findall(r"\b[A-D]\b", sample.answer)
            assert sample.points == float(letters[:1] == [truths[task, number]]), sample
    assert len(pairs) == 4 * 4 + 4 + 20 * 4 - 4 and differing(pairs) <= 4


VIDEOMME = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond "
    "with only the letter (A, B, C, or D) of the correct option.\n"
)


def logged_inputs(output, task):
    """What lmms-eval says a task asked, by number."""
    (file,) = output.rglob(f"*_samples_{task}.jsonl")
    samples = [json.loads(line) for line in file.read_text().split("\n") if line]
    return {sample["doc_id"]: json.dumps(sample) for sample in samples}


def test_videomme_with_and_without_subtitles(root, finished, tiny):
    samples = read_run(finished[0]).samples
    pairs = []
    for number, row in enumerate(rows_of(root, "lmms-eval/Video-MME", None, "test")):
        sample, video = samples["videomme_w_subtitle", number], root / f"videomme/data/{row['videoID']}.mp4"
        prompt = VIDEOMME + row["question"] + "\n" + "\n".join(row["options"]) + "\nThe best answer is:"
        text = f"This video's subtitles are listed below: \n{SPOKEN}\n{prompt}"
        if not sample.error:
            answer = tiny.ask(video, text, think=False, frames=FRAMES, gen_length=2, block_length=2, steps=2)
            pairs.append((sample, answer))
            assert SPOKEN in logged_inputs(finished[0], "videomme_w_subtitle")[number]
        assert SPOKEN not in logged_inputs(finished[0], "videomme")[number]
    assert differing(pairs) <= 1


def test_longvideobench_with_and_without_subtitles(root, finished, tiny):
    """With them, frames and what was said meanwhile take turns."""
    samples = read_run(finished[0]).samples
    pairs = []
    for number, row in enumerate(rows_of(root, "longvideobench/LongVideoBench", None, "validation")):
        video = root / "datasets/longvideobench/videos" / row["video_path"]
        options = [row[f"option{place}"] for place in range(5) if row[f"option{place}"] != "N/A"]
        lettered = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCDE", options, strict=False))
        prompt = f"{row['question']}\n{lettered}\nAnswer with the option's letter from the given choices directly.\n"
        frames = list(sample_frames(video, Sampling(fps=1)).images)
        turns = f"<image>\n<image>\n{SPOKEN}\n<image>\n<image>\n"
        for task, media, text in (
            ("longvideobench_val_v", video, prompt),
            ("longvideobench_val_i", frames, turns + prompt),
        ):
            settings = {"think": False, "frames": FRAMES, "gen_length": 2, "block_length": 2, "steps": 2}
            answer = tiny.ask(media, text, **settings)
            sample = samples[task, number]
            pairs.append((sample, answer))
            assert Path(sample.cluster).name == video.name  # questions about one video depend on each other
            assert (SPOKEN in logged_inputs(finished[0], task)[number]) == (task == "longvideobench_val_i")
    assert differing(pairs) <= 2


def test_shapes_is_the_figure_of_shapes_evaluate(root, finished, tiny):
    """In all its parts, standard errors included."""
    entries = read_questions(root / "vidlada/shapes/test.json")

    def answers(video, questions):
        media = tiny.encode_video(video, frames=FRAMES)
        found = tiny.ask_many([(media, text) for text, _ in questions], [choices for _, choices in questions])
        return [answer.text for answer in found]

    report, result = evaluate(entries, root / "vidlada/shapes", answers), read_run(finished[0]).results["shapes"]
    assert any(entry["choices"] for entry in entries) and set(result.kinds) == set(report.families)
    for family, score in report.families.items():
        assert result.kinds[family].percent == pytest.approx(score.mean), family
    assert result.score.percent == pytest.approx(report.all.mean) == pytest.approx(result.lmms_eval["shapes"])
    assert result.score.standard_error == pytest.approx(report.all.standard_error)


def left_out(root, sample):
    """Whether lmms-eval's score does without this sample where its answer is empty."""
    if sample.task == "video_mmmu_adaptation":
        rows = rows_of(root, "lmms-eval/VideoMMMU", "Adaptation", "test")
        return rows[sample.doc_id]["question_type"] == "open"
    return sample.task.startswith("mvbench")


def test_lmms_eval_s_own_scores_agree_where_nothing_failed(root, finished):
    for name, result in read_run(finished[0]).results.items():
        if name == "egoschema" or result.failed:
            continue
        for task, score in result.tasks.items():
            own = result.lmms_eval[task]
            if result.benchmark.mean == "kinds":  # counts absent types as zero
                own *= len(result.benchmark.kinds) / len(result.kinds)
                assert result.score.percent == pytest.approx(own), task
            # unreadable answers are drawn at random; letters of the type `perception` are never read
            elif name not in ("egoschema_subset", "longvideobench_val_v") and task != "video_mmmu_perception":
                samples = [sample for sample in result.samples if sample.task == task]
                assert score.percent == pytest.approx(100 * statistics.mean(sample.points for sample in samples)), task
                points = [sample.points for sample in samples if sample.answer or not left_out(root, sample)]
                assert own == pytest.approx(100 * statistics.mean(points) if points else 0, abs=1e-3), task


def test_egoschema_is_written_not_sent(root, finished):
    output, (printed, _), _ = finished
    written = json.loads((output / SUBMISSION_FILE).read_text())
    assert set(written) == {row["video_idx"] for row in rows_of(root, "lmms-eval/egoschema", "Subset", "test")}
    assert set(written.values()) <= {-1, 0, 1, 2, 3, 4}
    assert "| EgoSchema * | 4 | – |" in printed


def test_an_interrupted_run_goes_on(finished, tmp_path):
    output, _, options = finished
    copy = tmp_path / "again"
    shutil.copytree(output, copy, ignore=shutil.ignore_patterns("lmms-eval", LOG_FILE, "runs"))
    (copy / "cache/answers/runs/interrupted").mkdir(parents=True)
    (copy / "cache/answers/cache.db").rename(
        copy / "cache/answers/runs/interrupted/rank_0.db"
    )  # how lmms-eval leaves them
    vidlada_eval("--tasks", "shapes", "--output", copy, *options)
    before, after = read_run(output).samples, read_run(copy).samples
    assert len(after) == 8 and all(sample.answer == before[key].answer for key, sample in after.items())
    hits = re.findall(r"ResponseCache stats: (\d+) hits", (copy / LOG_FILE).read_text())
    kept = sum(sample.answer != "" for sample in after.values())  # lmms-eval keeps no empty answers
    assert sum(map(int, hits)) == kept > 0


def test_answers_are_kept_across_commits(tmp_path, monkeypatch):
    """By itself lmms-eval takes the commit of a checkout around it for its own version."""
    for name, value in environment(tmp_path, tmp_path).items():
        monkeypatch.setenv(name, value)
    assert get_lmms_eval_cache_version() == version("lmms-eval")


def test_two_processes_give_the_answers_of_one(finished, tmp_path):
    output, _, options = finished
    vidlada_eval("--tasks", "shapes", "--output", tmp_path / "two", "--processes", 2, *options)
    one, two = read_run(output).samples, read_run(tmp_path / "two").samples
    assert len(two) == 8 and {path.name for path in (tmp_path / "two/lmms-eval").glob("record-*")} == {
        "record-0.jsonl", "record-1.jsonl"}  # fmt: skip
    for key, sample in two.items():
        expected = one[key]
        assert (sample.question, sample.error) == (expected.question, expected.error)
        assert Path(sample.video).name == Path(expected.video).name
        assert sample.answer != expected.answer or sample.points == expected.points
    # other shapes round differently; answers that went to others' questions would differ everywhere
    assert sum(sample.answer == one[key].answer for key, sample in two.items()) > 5


def test_a_run_with_an_adapter(root, small_folder, adapter, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")  # lmms-eval as it is installed, with all its tasks
    options = ("--tasks", "mlvu_dev", "--data-root", root, "--frames", 2, "--device", "cpu", "--gen", "gen_length=4")
    vidlada_eval("--model", small_folder, "--adapter", adapter, "--output", tmp_path / "run", *options)
    model = vidlada.load(adapter, device="cpu")
    samples = read_run(tmp_path / "run").samples
    expected = [prompt for prompt in prompts(root) if prompt[0] == "mlvu_dev"]
    assert len(samples) == len(expected)
    for task, number, video, text in expected:
        answer = model.ask(root / video, text + "/no_think", frames=2, gen_length=4)
        assert samples[task, number].answer == answer.text.removesuffix(".").strip()


def test_choosing_by_likelihood_in_two_processes(root, tiny, tmp_path):
    variables = environment(root, tmp_path)
    del variables["PYTHONSAFEPATH"]  # as users start it: the folder vidlada of the data root is on the path then
    done = subprocess.run(
        [Path(sys.executable).with_name("accelerate"), "launch", "--cpu", "--num_processes", "2", "-m", "lmms_eval",
         "--model", "llava_llada_video", "--force_simple", "--model_args",
         f"pretrained=tiny,max_frames_num={FRAMES},device=cpu,mc_num=4,is_check_greedy=False",
         "--tasks", "egoschema_subset_mcppl", "--log_samples", "--output_path", str(tmp_path)],
        capture_output=True, text=True, cwd=root, env=variables, timeout=1800,
    )  # fmt: skip
    (file,) = Path(tmp_path).rglob("*_samples_egoschema_subset_mcppl.jsonl")
    rows = rows_of(root, "lmms-eval/egoschema", "Subset", "test")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == len(rows) == 4, done.stdout
    for sample in samples:
        row = rows[sample["doc_id"]]
        chat = tiny.chat(root / f"egoschema/videos/{row['video_idx']}.mp4", frames=FRAMES)
        prompt = chat.request(row["question"]).prompt
        with torch.inference_mode():
            bounds = [
                negative_log_likelihood(tiny.model, prompt, tiny.processor.text_ids(option.split(".")[1].strip()), 4)
                for option in row["option"]
            ]
        assert sample["score"]["pred"] == bounds.index(min(bounds))
