"""Scores, errors and comparisons of run folders made by hand, against figures computed another way."""

import json
import math
import statistics
import warnings
from pathlib import Path

import pytest

from vidlada.errors import InputError
from vidlada.evaluation.benchmarks import BENCHMARKS, MLVU_DEV, video_mmmu_right
from vidlada.evaluation.compare import COMPARISON_FILES, compare_runs, compare_text, exact_mcnemar
from vidlada.evaluation.data import Gap
from vidlada.evaluation.folder import read_run_file
from vidlada.evaluation.plots import draw
from vidlada.evaluation.report import report_dict, report_text, write_report
from vidlada.evaluation.results import read_run, run_labels
from vidlada.evaluation.run import RunSettings, start_run
from vidlada.scores import mean_of_scores, mean_score

DATE = "20260101_000000"


def mlvu_sample(number, kind, right):
    judged = {"question_id": "q", "task_type": kind, "pred_answer": "A", "answer": "A" if right else "B"}
    return {"doc_id": number, "filtered_resps": "A", "mlvu_percetion_score": judged}


def make_run(folder, tasks, record=(), date=DATE, **settings):
    """A run folder as lmms-eval and the plug-in leave it; `tasks` maps a task to its score and samples."""
    names = [name for name, each in BENCHMARKS.items() if any(task.name in tasks for task in each.tasks)]
    start_run(folder, RunSettings("tiny", **settings), [BENCHMARKS[name] for name in names])
    below = folder / "lmms-eval" / "tiny"
    below.mkdir(parents=True, exist_ok=True)
    scores = {task: {f"{metric},none": score} for task, (metric, score, _) in tasks.items()}
    (below / f"{date}_results.json").write_text(json.dumps({"results": scores}))
    for task, (_, _, samples) in tasks.items():
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        (below / f"{date}_samples_{task}.jsonl").write_text(lines)
    text = "".join(json.dumps({"seconds": 0.5, "tokens": 2, "forward_passes": 2, "video": None, "error": None,
                               "time": 1, **entry}) + "\n" for entry in record)  # fmt: skip
    (folder / "lmms-eval/record-0.jsonl").write_text(text)
    return folder


@pytest.fixture
def mlvu(tmp_path):
    """Five of the seven types, of unequal size; sample 0 failed, though a random answer hit."""
    rights = {"count": [True, False], "ego": [True] * 3, "needle": [False], "order": [True, False, False],
              "plotQA": [True, True]}  # fmt: skip
    listed = [(kind, right) for kind, each in rights.items() for right in each]
    samples = [mlvu_sample(number, kind, right) for number, (kind, right) in enumerate(listed)]
    record = [{"task": "mlvu_dev", "doc_id": n, "video": f"v{n // 2}"} for n in range(len(samples))]
    record[0]["error"] = "v0.mp4: the file is truncated"
    return make_run(tmp_path / "mlvu", {"mlvu_dev": ("mlvu_percetion_score", 40.0, samples)}, record)


def test_mean_over_types_that_are_there(mlvu):
    result = read_run(mlvu).results["mlvu_dev"]
    means = {"count": 0, "ego": 100, "needle": 0, "order": 100 / 3, "plotQA": 100}
    assert {kind: score.percent for kind, score in result.kinds.items()} == pytest.approx(means)
    assert result.score.percent == pytest.approx(statistics.mean(means.values()))
    assert result.score.number == 11
    assert set(result.absent) == set(MLVU_DEV) - set(means)
    assert [(s.doc_id, s.points) for s in result.failed] == [(0, 0.0)]
    assert result.lmms_eval == {"mlvu_dev": 40.0}


def test_the_report_says_it_all(mlvu):
    run = read_run(mlvu)
    text = report_text(run)
    assert "MLVU, dev lacks anomaly_reco, topic_reasoning" in text
    assert "| anomaly_reco | absent |" in text
    assert "mlvu_dev 0: v0.mp4: the file is truncated" in text
    assert "| MLVU, dev * | 11 | 46.7 |" in text and "torch 2" in text and "think_mode=no_think" in text
    data = report_dict(run)["benchmarks"]["mlvu_dev"]
    assert data["percent"] == pytest.approx(46.6667, abs=1e-3) and data["paper"] is None
    assert [path.name for path in write_report(run)] == ["report.md", "report.json", "answers.jsonl", "report.png"]
    assert json.loads((mlvu / "report.json").read_text())["cost"]["samples"] == 10
    assert (mlvu / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_fractions_and_percents_on_one_scale(tmp_path):
    lvbench = [{"doc_id": n, "filtered_resps": "A", "lvbench_score": n < 3} for n in range(4)]
    choice = {"id": "validation_Art_1", "question_type": "multiple-choice", "answer": "A", "parsed_pred": "A"}
    track = [{"doc_id": 0, "filtered_resps": "A", "mmmu_acc": choice}]
    ego = [{"doc_id": n, "filtered_resps": "A", "score": {"pred": n, "ground_truth": "1"}} for n in range(2)]
    moved = [{"doc_id": n, "filtered_resps": "", "mvbench_accuracy": {"score": 0, "pred_answer": ""}} for n in range(2)]
    run = read_run(make_run(tmp_path / "run", {
        "lvbench": ("lvbench_score", 0.75, lvbench), "video_mmmu_adaptation": ("mmmu_acc", 1.0, track),
        "egoschema_subset": ("score", 0.5, ego), "mvbench_moving_count": ("mvbench_accuracy", 0, moved),
    }))  # fmt: skip
    percents = {name: result.score.percent for name, result in run.results.items()}
    assert percents == {"lvbench": 75.0, "video_mmmu": 100.0, "egoschema_subset": 50.0, "mvbench": 0.0}
    for result in run.results.values():
        for task, score in result.tasks.items():
            assert result.lmms_eval[task] == pytest.approx(score.percent)
    text = report_text(run)
    assert "| LVBench * | 4 | 75.0 | 25.0 | 44.7 | – | 0 | 0 |" in text
    assert {name: result.without_letter for name, result in run.results.items()} == {
        "lvbench": 0, "video_mmmu": 0, "egoschema_subset": 0, "mvbench": 2,
    }  # fmt: skip
    assert "Video-MMMU lacks video_mmmu_comprehension, video_mmmu_perception" in text


def test_standard_errors():
    values = [1.0, 0.0, 1.0, 1.0, 0.0]
    alone = mean_score(values, list("abcde"))
    assert alone.standard_error == pytest.approx(100 * statistics.stdev(values) / math.sqrt(5))
    # copies of a sample say nothing new
    copied = mean_score([v for v in values for _ in range(4)], [c for c in "abcde" for _ in range(4)])
    assert copied.standard_error == pytest.approx(alone.standard_error)
    assert math.isnan(mean_score([1.0, 0.0], ["a", "a"]).standard_error)
    assert math.isnan(mean_score([], []).percent)


def test_intervals():
    shares = {(1, 1): (20.65, 100.0), (0, 10): (0.0, 27.75), (10, 10): (72.25, 100.0)}  # Wilson's, from tables
    for (right, number), interval in shares.items():
        score = mean_score([1.0] * right + [0.0] * (number - right), list(map(str, range(number))))
        assert (score.low, score.high) == pytest.approx(interval, abs=0.01)
    score = mean_score([1.0, 0.0] * 50, list(map(str, range(100))))
    assert (score.low, score.high) == pytest.approx((50 - 9.85, 50 + 9.85), abs=0.01)
    both = mean_of_scores([score, score])
    assert both.high - both.percent == pytest.approx((score.high - 50) / math.sqrt(2))
    assert both.standard_error == pytest.approx(score.standard_error / math.sqrt(2))


def test_what_is_skipped_counts_neither_as_right_nor_as_wrong(tmp_path):
    """Of a missing video, its questions; of a missing task, all; what failed otherwise stays wrong."""
    samples = [{"doc_id": n, "filtered_resps": "C", "lvbench_score": n == 0} for n in range(4)]
    record = [{"task": "lvbench", "doc_id": n, "video": f"lvbench/{n}.mp4"} for n in range(4)]
    for entry in record[2:]:
        entry["error"] = "it is not there"
    tasks = {"lvbench": ("lvbench_score", 25.0, samples)}
    plain = read_run(make_run(tmp_path / "plain", tasks, record)).results["lvbench"]
    assert (plain.score.percent, len(plain.failed), plain.skipped) == (25.0, 2, [])
    folder = make_run(tmp_path / "run", tasks, record)
    benchmarks = [BENCHMARKS["lvbench"], BENCHMARKS["mlvu_dev"]]
    gaps = {"lvbench": Gap(None, ("lvbench/3.mp4",)), "mlvu_dev": Gap("none of its 2 videos is there")}
    start_run(folder, RunSettings("tiny"), benchmarks, gaps)
    run = read_run(folder)
    result = run.results["lvbench"]
    assert result.score.percent == pytest.approx(100 / 3) and result.score.number == 3
    assert [sample.doc_id for sample in result.failed] == [2] and [s.doc_id for s in result.skipped] == [3]
    text = report_text(run)
    assert "| LVBench * | 3 | 33.3 |" in text and "| MLVU, dev | skipped | – |" in text
    assert "- mlvu_dev: none of its 2 videos is there" in text and "- lvbench: 1 questions about lvbench/3.mp4" in text
    assert report_dict(run)["benchmarks"]["lvbench"]["skipped"] == 1
    start_run(folder, RunSettings("tiny"), benchmarks)  # the data has come
    assert read_run_file(folder)["skipped"] == {}


def test_every_answer_is_written(mlvu):
    write_report(read_run(mlvu))
    lines = [json.loads(line) for line in (mlvu / "answers.jsonl").read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == list(range(11))
    assert lines[0]["error"].startswith("v0.mp4") and (lines[0]["points"], lines[0]["letter"]) == (0.0, "A")


def test_newest_results_count_and_a_repaired_video_is_forgiven(mlvu):
    samples = [mlvu_sample(n, "count", True) for n in range(2)]
    repaired = {"task": "mlvu_dev", "doc_id": 0, "time": 2}
    with (mlvu / "lmms-eval/record-0.jsonl").open("a") as file:
        file.write(
            json.dumps({**repaired, "error": None, "video": "v", "seconds": 1, "tokens": 2, "forward_passes": 2})
        )
        file.write('\n{"task": "mlvu_d')  # cut short
    below = mlvu / "lmms-eval" / "tiny"
    (below / "20260102_000000_results.json").write_text(json.dumps({"results": {"mlvu_dev": {}}}))
    (below / "20260102_000000_samples_mlvu_dev.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    result = read_run(mlvu).results["mlvu_dev"]
    assert (result.score.percent, result.failed, result.lmms_eval) == (100.0, [], {})


def test_hidden_answers_give_no_score(tmp_path):
    samples = [{"doc_id": 0, "filtered_resps": "A", "bypass": None}]
    run = read_run(make_run(tmp_path / "run", {"egoschema": ("bypass", 999, samples)}))
    assert "| EgoSchema * | 1 | – | – | – | – | 0 |" in report_text(run)
    assert report_dict(run)["benchmarks"]["egoschema"]["percent"] is None


def test_open_answers_of_video_mmmu():
    def right(answer, parsed):
        return video_mmmu_right({"question_type": "open", "answer": answer, "parsed_pred": parsed})

    assert right("12.50", ["about", 12.5]) and right("1,200", [1200.0]) and right("red circle", ["a red circle."])
    assert not right("12.5", [12.6]) and not right("d", ["red"]) and right("d", ["d or e"])
    assert right(["x y", "7"], [7.0]) and not right("5", "API Error")


@pytest.mark.parametrize(
    "parsed, right", [("B", True), ("A", False), ([" b", "b "], True), ([" a", "a "], False), ("API Error", False)]
)
def test_letters_of_video_mmmu(parsed, right):
    for kind in ("multiple-choice", "perception"):
        assert video_mmmu_right({"question_type": kind, "answer": "B", "parsed_pred": parsed}) == right


def test_only_whole_benchmarks_are_set_against_the_paper(tmp_path):
    few, whole = run_of(tmp_path / "few", [True] * 20), run_of(tmp_path / "whole", [True, False] * 774 + [True])
    assert "| LVBench * | 20 | 100.0 | 0.0 | 44.7 | – | 0 |" in report_text(few)
    assert "| LVBench | 1549 | 50.0 | 1.3 | 44.7 | +5.3 | 0 |" in report_text(whole)
    differences = [report_dict(run)["benchmarks"]["lvbench"]["difference"] for run in (few, whole)]
    assert differences == [None, pytest.approx(50.0 - 44.7, abs=0.1)]


def run_of(folder, rights, task="lvbench", **settings):
    """A run whose samples were right or wrong."""
    samples = [{"doc_id": n, "filtered_resps": "A", "lvbench_score": right} for n, right in enumerate(rights)]
    return read_run(make_run(folder, {task: ("lvbench_score", 0, samples)}, **settings))


@pytest.fixture
def pair(tmp_path):
    """Two runs of forty samples, of which seven differ."""
    first = [i % 2 == 0 for i in range(40)]
    other = [True if i < 12 else right for i, right in enumerate(first)]
    other[20] = False
    runs = [run_of(tmp_path / "none", first, model_changes={"cache": "none"}),
            run_of(tmp_path / "mars", other, model_changes={"cache": "mars"})]  # fmt: skip
    return runs, [int(b) - int(a) for a, b in zip(first, other, strict=True)]


def test_comparison(pair):
    runs, gains = pair
    (row,) = compare_runs(runs)["compared"]
    assert (row["better"], row["worse"], row["number"]) == (6, 1, 40)
    assert row["difference"] == pytest.approx(100 * 5 / 40)
    assert row["standard_error"] == pytest.approx(100 * statistics.stdev(gains) / math.sqrt(40), abs=1e-3)
    assert row["p"] == pytest.approx(2 * (1 + 7) / 2**7)
    text = compare_text(compare_runs(runs))
    assert "| LVBench | 40 | 50.0 | mars | 62.5 | +12.5 |" in text and "| cache | none | mars |" in text
    assert compare_runs(runs)["differing"] == {"cache": ["none", "mars"]}
    with pytest.raises(InputError, match="two runs"):
        compare_runs(runs[:1])


def test_only_the_same_questions_are_paired(tmp_path):
    """Copies of a benchmark may number its rows otherwise."""
    runs = []
    for name, order in (("a", "pqrs"), ("b", "pqsr"), ("c", "wxyz")):
        rows = [{"doc_id": n, "doc_hash": row, "filtered_resps": "A", "lvbench_score": row in "pr"}
                for n, row in enumerate(order)]  # fmt: skip
        runs.append(read_run(make_run(tmp_path / name, {"lvbench": ("lvbench_score", 0, rows)})))
    (row,) = compare_runs(runs[:2])["compared"]
    assert (row["number"], row["baseline_percent"], row["percent"]) == (2, 100.0 / 2, 100.0 / 2)
    with pytest.raises(InputError, match="c has no judged samples in common with .*a"):
        compare_runs(runs)


def test_runs_of_one_name_get_their_paths(tmp_path):
    folders = [str(tmp_path / name) for name in ("x/run", "y/run")]
    assert run_labels(folders) == folders and run_labels([folders[0], folders[0]]) == ["run", "run"]
    runs = [run_of(Path(folder), [True, False]) for folder in folders]
    text = compare_text(compare_runs(runs))
    assert f"| LVBench | 2 | 50.0 | {folders[1]} | 50.0 |" in text and "differing" not in text  # nothing does


def test_the_plot_shows_what_is_known(mlvu, tmp_path):
    """Every bar has its interval, also of a mean over types with one sample each, which has no standard error; a part
    of a benchmark is marked."""
    whole = run_of(tmp_path / "whole", [True, False] * 774 + [True])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (axes,) = draw([read_run(mlvu), whole]).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["MLVU, dev *", "LVBench"]
    bars = {container.get_label(): container for container in axes.containers if hasattr(container, "patches")}
    widths = {name: [bar.get_width() for bar in each] for name, each in bars.items()}
    assert widths["mlvu"] == [pytest.approx(46.67, abs=0.01), pytest.approx(math.nan, nan_ok=True)]
    ends = {name: each.errorbar[2][0].get_segments() for name, each in bars.items()}
    score = read_run(mlvu).results["mlvu_dev"].score
    assert math.isnan(score.standard_error)
    ((left, _), (right, _)), nothing = ends["mlvu"]
    assert (left, right) == (score.low, score.high) and left < score.percent < right and not len(nothing)
    (left, _), (right, _) = ends["whole"][1]
    assert right - left == pytest.approx(2 * 1.96 * whole.results["lvbench"].score.standard_error)


def test_several_runs_against_the_first(pair, tmp_path):
    runs, _ = pair
    third = run_of(tmp_path / "third", [True] * 20, limit=20)  # has only half of the samples
    rows = compare_runs([*runs, third])["compared"]
    assert [(Path(row["run"]).name, row["number"], row["worse"]) for row in rows] == [("mars", 40, 1), ("third", 20, 0)]


def test_all_samples_together(tmp_path):
    judged = {"question_id": "q", "task_type": "count", "pred_answer": "A", "answer": "A"}

    def run_with(name, right):
        lvbench = [{"doc_id": n, "filtered_resps": "A", "lvbench_score": right} for n in range(3)]
        mlvu = [{"doc_id": 0, "filtered_resps": "A", "mlvu_percetion_score": judged}]
        tasks = {"lvbench": ("lvbench_score", 0, lvbench), "mlvu_dev": ("mlvu_percetion_score", 0, mlvu)}
        return read_run(make_run(tmp_path / name, tasks))

    *_, last = compare_runs([run_with("a", False), run_with("b", True)])["compared"]
    assert (last["title"], last["number"], last["better"]) == ("all samples", 4, 3)
    assert (last["baseline_percent"], last["percent"]) == (25.0, 100.0)


def test_a_comparison_is_written(pair, tmp_path, vidlada_eval):
    folder = tmp_path / "comparison"
    code, out, err = vidlada_eval("compare", *(run.folder for run in pair[0]), "--output", folder)
    assert code == 0 and out.startswith("| benchmark | samples | none | run |") and "comparison.png" in err
    assert {path.name for path in folder.iterdir()} == set(COMPARISON_FILES)
    assert json.loads((folder / "comparison.json").read_text())["compared"][0]["better"] == 6


def test_mcnemar():
    assert exact_mcnemar(0, 0) == exact_mcnemar(3, 3) == 1.0
    assert exact_mcnemar(10, 0) == pytest.approx(2 / 2**10)
    assert exact_mcnemar(2000, 1900) == exact_mcnemar(1900, 2000) < 0.2


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="not the folder of a run"):
        read_run(tmp_path)
    start_run(tmp_path / "begun", RunSettings("tiny"), [BENCHMARKS["lvbench"]])
    with pytest.raises(InputError, match="no results yet"):
        read_run(tmp_path / "begun")
