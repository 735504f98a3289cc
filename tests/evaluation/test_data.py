"""Local copies of the benchmarks in their published layouts: what is there, what is missing."""

import json
import shutil

import pytest
from miniature import WRITERS, write_rows
from pyarrow.parquet import read_table

from vidlada.errors import InputError
from vidlada.evaluation.benchmarks import BENCHMARKS, PAPER_TASKS
from vidlada.evaluation.data import check_task, documents, question_files, repository_folder

# Where the hub has the questions of each benchmark's first task
PUBLISHED = {
    "videomme": "lmms-eval/Video-MME/videomme/test-00000-of-00001.parquet",
    "videomme_w_subtitle": "lmms-eval/Video-MME/videomme/test-00000-of-00001.parquet",
    "egoschema_subset": "lmms-eval/egoschema/Subset/test-00000-of-00001.parquet",
    "egoschema": "lmms-eval/egoschema/GENERATION/test-00000-of-00001.parquet",
    "mlvu_dev": "sy1998/MLVU_dev/data/test-00000-of-00001.parquet",
    "mlvu_test": "sy1998/MLVU_Test/data/test-00000-of-00001.parquet",
    "lvbench": "lmms-eval/LVBench/data/train-00000-of-00001.parquet",
    "video_mmmu": "lmms-eval/VideoMMMU/Adaptation/test-00000-of-00001.parquet",
    "longvideobench_val_v": "longvideobench/LongVideoBench/validation-00000-of-00001.parquet",
    "longvideobench_val_i": "longvideobench/LongVideoBench/validation-00000-of-00001.parquet",
    "mvbench": "OpenGVLab/MVBench/json/action_sequence.json",
    "shapes": "vidlada/shapes/test.jsonl",
}


def rows_of(file):
    """Read another way than the code under test does."""
    if file.suffix == ".parquet":
        return len(read_table(file))
    text = file.read_text()
    return len(json.loads(text)) if file.suffix == ".json" else text.count("\n")


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda benchmark: benchmark.name)
@pytest.mark.parametrize("with_readme", [True, False])
def test_every_question_is_counted_once(root, tmp_path, benchmark, with_readme):
    shutil.copytree(root / benchmark.repository, tmp_path / benchmark.repository)
    if not with_readme:
        (tmp_path / benchmark.repository / "README.md").unlink()
    file = tmp_path / PUBLISHED[benchmark.name]
    assert question_files(tmp_path / benchmark.repository, benchmark.tasks[0].config, benchmark.split) == [file]
    if benchmark.beside:
        shutil.copytree(root / benchmark.folder / benchmark.beside, tmp_path / benchmark.folder / benchmark.beside)
    assert check_task(tmp_path, benchmark, benchmark.tasks[0]).questions == rows_of(file)


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda benchmark: benchmark.name)
def test_a_missing_video_is_named(root, tmp_path, benchmark):
    copy = shutil.copytree(root, tmp_path / "copy")
    whole = {task.name: check_task(copy, benchmark, task) for task in benchmark.tasks}
    assert all(found.complete and found.videos >= 1 for found in whole.values())
    paths = [min((copy / benchmark.folder).rglob("*.mp4"))]
    if benchmark.name == "mvbench":
        paths.append(copy / "mvbench_video/tvqa/video_fps3_hq_segment/clip3")  # a folder of frames
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    lacking = {name: check_task(copy, benchmark, found.task) for name, found in whole.items()}
    assert {path for found in lacking.values() for path in found.missing} == {str(p.relative_to(copy)) for p in paths}
    assert all(found.questions == whole[name].questions for name, found in lacking.items())


def test_check_tells_what_is_missing(root, tmp_path, vidlada_eval):
    for place in ("lmms-eval/LVBench", "sy1998/MLVU_dev", "mlvu"):
        shutil.copytree(root / place, tmp_path / place)
    code, out, _ = vidlada_eval("check", "--tasks", "lvbench,mlvu_dev", "--data-root", tmp_path)
    assert code == 0 and "| lvbench | 2 | 1549 | 1 | 1 |" in out and "lvbench: missing lvbench/clip0.mp4" in out
    assert "hf download lmms-eval/LVBench" in out and "hf download sy1998" not in out
    code, out, _ = vidlada_eval("check", "--tasks", "mlvu_dev", "--data-root", tmp_path)
    assert "| mlvu_dev | 2 | – | 2 | 0 |" in out and "Everything is there." in out
    code, out, _ = vidlada_eval("check", "--tasks", "lvbench", "--data-root", tmp_path / "nowhere")
    assert code == 0 and "lmms-eval/LVBench is not below" in out


def test_check_as_json(root, vidlada_eval):
    tasks = json.loads(vidlada_eval("check", "--json", "--tasks", "paper", "--data-root", root)[1])["tasks"]
    assert set(tasks) == {task.name for name in PAPER_TASKS for task in BENCHMARKS[name].tasks}
    assert all(each["complete"] and each["questions"] >= 2 for each in tasks.values())


def test_subtitles_have_to_be_there(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    shutil.rmtree(copy / "videomme/subtitle")
    assert check_task(copy, BENCHMARKS["videomme"], BENCHMARKS["videomme"].tasks[0]).complete
    with_subtitles = BENCHMARKS["videomme_w_subtitle"]
    assert "videomme/subtitle is not there" in check_task(copy, with_subtitles, with_subtitles.tasks[0]).problem
    (copy / "datasets/longvideobench/subtitles/clip.json").unlink()
    without, within = BENCHMARKS["longvideobench_val_v"], BENCHMARKS["longvideobench_val_i"]
    assert check_task(copy, without, without.tasks[0]).complete
    problem = check_task(copy, within, within.tasks[0]).problem
    assert problem == "1 of 1 subtitle files are missing (e.g. clip.json)"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("srt", "1\n00:00:00,000 --> 00:00:03,000\ncaf\xe9\n\n".encode("latin-1"), "not in UTF-8"),
        ("srt", "1\n00:00:00,000 --> 00:00:03,000\ncafé\n\n".encode("utf-16"), "not in UTF-8"),
        ("srt", b"WEBVTT\n00:00.000 --> 00:03.000\nred\n\n", "not SubRip"),
        ("srt", "\ufeff1\r\n00:00:00,000 --> 00:00:03,000\r\nred\0\r\n\r\n".encode(), None),
        ("srt", b"", None),
        ("json", b'[{"timestamp": [0, 1], "text": "caf\xe9"}]', "not in UTF-8"),
        ("json", b'[{"timestamp": [0, 1], "text": "\\ud83d"}]', "half a character"),
        ("json", b'{"text": "red"}', "not a list"),
        ("json", b'[{"timestamp": [0, null], "text": ""}, {"start": "0:1:2", "end": "0:1:3.5", "line": "a"}]', None),
        ("json", b'[{"start": "00:00:01", "end": "00:00:02", "line": "a"}, {"start": "00:00:01"}]', "entry 1 is no"),
        ("json", b'[{"start": "00:01", "end": "00:02", "line": "a"}]', "entry 0 is no subtitle"),
        ("json", b'[{"timestamp": [0], "text": "a"}]', "entry 0 is no subtitle"),
        ("json", b'[{"timestamp": [null, 1.0], "text": "a"}]', "entry 0 is no subtitle"),
        ("json", b'[{"timestamp": [0, 1.0], "text": null}]', "entry 0 is no subtitle"),
        ("json", b"[", "not valid JSON"),
    ],
)
def test_subtitles_that_lmms_eval_would_end_at(root, tmp_path, name, content, problem):
    copy = shutil.copytree(root, tmp_path / "copy")
    folder = copy / ("videomme/subtitle" if name == "srt" else "datasets/longvideobench/subtitles")
    for path in folder.iterdir():
        path.write_bytes(content)
    benchmark = BENCHMARKS["videomme_w_subtitle" if name == "srt" else "longvideobench_val_i"]
    found = check_task(copy, benchmark, benchmark.tasks[0]).problem
    assert problem in found and str(folder) in found if problem else found is None


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ('[{"video_path": "a.mp4", "question": "\\ud83d"}]', "entry 0: 'question' has half a character"),
        ('["a"]', "entry 0 is no question"),
        ('[{"question": "a"}]', "no field 'video_path'"),
        ('[{"video_path": ', "not JSON"),
    ],
)
def test_questions_that_lmms_eval_would_end_at(tmp_path, rows, problem):
    folder = tmp_path / "lmms-eval/LVBench"
    folder.mkdir(parents=True)
    (folder / "train.json").write_text(rows)
    (folder / "README.md").write_bytes(b"---\nlicense: caf\xe9\n---\n")
    benchmark = BENCHMARKS["lvbench"]
    assert problem in check_task(tmp_path, benchmark, benchmark.tasks[0]).problem


def test_hf_home_is_the_root(root, monkeypatch, vidlada_eval):
    monkeypatch.setenv("HF_HOME", str(root))
    assert "Everything is there." in vidlada_eval("check", "--tasks", "videomme")[1]


def test_the_hub_s_own_cache(root, tmp_path):
    snapshot = tmp_path / "hub/datasets--lmms-eval--LVBench/snapshots/abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(root / "lmms-eval/LVBench")
    assert repository_folder(tmp_path, "lmms-eval/LVBench") == snapshot
    assert len(documents(snapshot, None, "train")) == 2


def test_layouts_of_datasets(tmp_path):
    readme = tmp_path / "README.md"
    write_rows(tmp_path / "json/count.json", [{"a": 1}])
    readme.write_text("---\nconfigs:\n- config_name: count\n  data_files: json/count.json\n---\ntext")
    assert documents(tmp_path, "count", "train") == [{"a": 1}]
    with pytest.raises(InputError, match="no files of the test split of other"):
        documents(tmp_path, "other", "test")
    readme.write_text("---\n{: damaged\n---\n")
    with pytest.raises(InputError, match="damaged"):
        documents(tmp_path, "count", "train")
    readme.unlink()
    for number in range(2):  # several shards, in order
        write_rows(tmp_path / f"test-0000{number}-of-00002.parquet", [{"a": number}])
    assert documents(tmp_path, None, "test") == [{"a": 0}, {"a": 1}]
    (tmp_path / "test-00001-of-00002.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(InputError, match="test-00001-of-00002.parquet: cannot be read"):
        documents(tmp_path, None, "test")


def test_the_default_configuration_is_taken(tmp_path):
    main = {"config_name": "main", "default": True, "data_files": [{"split": "test", "path": ["a-*.jsonl"]}]}
    parts = [{"config_name": "other", "data_files": "b.jsonl"}, main]
    (tmp_path / "README.md").write_text(f"---\n{json.dumps({'configs': parts})}\n---\n")
    write_rows(tmp_path / "a-1.jsonl", [{"a": 1}])
    write_rows(tmp_path / "b.jsonl", [{"b": 1}])
    assert documents(tmp_path, None, "test") == [{"a": 1}]


def test_another_version_of_a_dataset_is_named(tmp_path):
    benchmark = BENCHMARKS["lvbench"]
    write_rows(tmp_path / PUBLISHED["lvbench"], [{"video": "x.mp4"}])
    assert "no field 'video_path'" in check_task(tmp_path, benchmark, benchmark.tasks[0]).problem


def test_there_is_a_miniature_of_everything():
    assert set(WRITERS) == {benchmark.repository for benchmark in BENCHMARKS.values()}
