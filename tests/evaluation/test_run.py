"""What runs with which settings, what data is there, what the command line refuses; lmms-eval is not needed."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from vidlada.cli import main
from vidlada.errors import InputError, VidLaDAError
from vidlada.evaluation import run as running
from vidlada.evaluation.benchmarks import BENCHMARKS, chosen
from vidlada.evaluation.data import check_task, documents, repository_folder
from vidlada.evaluation.folder import SUBMISSION_FILE, read_run_file
from vidlada.evaluation.miniature import write_miniatures
from vidlada.evaluation.run import RunSettings, command, launches, letter_place, start_run


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "root"
    write_miniatures(folder, list(BENCHMARKS.values()), clips=1, number=2)
    return folder


def vidlada(*arguments):
    done = CliRunner().invoke(main, ["eval", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def options_after(arguments, name):
    return arguments[arguments.index(name) + 1]


def test_paper_preset():
    first, second, third = launches(chosen("paper"), RunSettings("tiny"))
    assert first.tasks == ("videomme", "mlvu_dev", "mlvu_test", "lvbench", "video_mmmu", "longvideobench_val_v")
    assert (second.tasks, second.predict_only) == (("egoschema",), True)
    assert (third.tasks, third.model_arguments["add_time_instruction"]) == (("mvbench",), True)
    arguments = command(first, RunSettings("tiny", batch_size=4), Path("/out"))
    assert options_after(arguments, "--model_args") == (
        "pretrained=tiny,max_frames_num=64,video_fps=1.0,force_sample=False,add_time_instruction=False"
    )
    assert options_after(arguments, "--gen_kwargs") == (
        "gen_length=2,block_length=2,gen_steps=2,temperature=0,cfg=0,remasking=low_confidence,think_mode=no_think"
    )
    assert options_after(arguments, "--batch_size") == "4" and "--predict_only" not in arguments
    assert "--predict_only" in command(second, RunSettings("tiny"), Path("/out"))


def test_egoschema_is_sent_only_when_asked():
    (unsent,) = launches(chosen("egoschema"), RunSettings("tiny"))
    (sent,) = launches(chosen("egoschema"), RunSettings("tiny"), submit=True)
    assert unsent.predict_only and not sent.predict_only
    (subset,) = launches(chosen("egoschema_subset"), RunSettings("tiny"))
    assert not subset.predict_only


def test_changes_replace_the_preset():
    changed = RunSettings("tiny", model_changes={"cache": "mars:text=8,ratio=2", "threshold": 0.9, "max_frames_num": 8},
                          generation_changes={"gen_length": 32, "block_length": 16, "temperature": 0.5})  # fmt: skip
    (launch,) = launches(chosen("lvbench"), changed)
    assert "gen_steps" not in launch.generation_arguments and launch.generation_arguments["do_sample"] is True
    text = options_after(command(launch, changed, Path("/out"), processes=2), "--model_args")
    assert "cache=mars:text=8;ratio=2" in text and "threshold=0.9" in text and "max_frames_num=8" in text
    assert launches(chosen("lvbench"), RunSettings("tiny", "task"))[0].generation_arguments == {}


def test_longer_answers_get_a_step_a_token():
    (launch,) = launches(chosen("lvbench"), RunSettings("tiny", generation_changes={"gen_length": 32}))
    assert launch.generation_arguments["gen_length"] == 32
    assert not {"block_length", "gen_steps"} & set(launch.generation_arguments)


@pytest.mark.parametrize("changes", [{"cache": "nonsense"}, {"threshold": 7.0}, {"dtype": None, "nonsense": 1}])
def test_bad_settings_stop_before_anything_starts(changes):
    with pytest.raises(InputError):
        launches(chosen("lvbench"), RunSettings("tiny", model_changes=changes))


def test_unknown_tasks_are_named():
    with pytest.raises(InputError, match="unknown task nextqa"):
        chosen("videomme,nextqa")
    with pytest.raises(InputError, match="unknown task"):
        chosen(" , ")


def test_a_folder_keeps_to_its_settings(tmp_path, monkeypatch):
    start_run(tmp_path / "run", RunSettings("tiny"), chosen("lvbench"))
    start_run(tmp_path / "run", RunSettings("tiny"), chosen("mlvu_dev"))
    about = read_run_file(tmp_path / "run")
    assert about["tasks"] == ["lvbench", "mlvu_dev"] and about["versions"]["torch"]
    assert about["arguments"]["lvbench"]["generation"]["gen_steps"] == 2
    with pytest.raises(InputError, match="another limit"):
        start_run(tmp_path / "run", RunSettings("tiny", limit=3), chosen("lvbench"))
    monkeypatch.setattr(running, "weights_fingerprint", lambda folder: "trained further")
    with pytest.raises(InputError, match="another weights"):
        start_run(tmp_path / "run", RunSettings("tiny"), chosen("lvbench"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="in use"):
        start_run(tmp_path / "other", RunSettings("tiny"), chosen("lvbench"))


def test_fingerprints_tell_weights_apart(small_folder, tmp_path):
    copy = Path(shutil.copytree(small_folder, tmp_path / "copy"))
    assert running.weights_fingerprint(copy) == running.weights_fingerprint(small_folder)
    (weights,) = copy.glob("*.safetensors")
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert running.weights_fingerprint(copy) != running.weights_fingerprint(small_folder)


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda benchmark: benchmark.name)
def test_miniatures_are_complete(root, benchmark):
    for task in benchmark.tasks:
        found = check_task(root, benchmark, task)
        assert found.complete and found.videos >= 1 and found.questions >= 2


def test_check_tells_what_is_missing(root, tmp_path):
    (root / "lvbench").rename(root / "elsewhere")
    try:
        code, out, _ = vidlada("--check", "--tasks", "lvbench,mlvu_dev", "--data-root", root)
    finally:
        (root / "elsewhere").rename(root / "lvbench")
    assert code == 0 and "lvbench: missing lvbench/clip0.mp4" in out
    assert "hf download lmms-eval/LVBench" in out and "hf download sy1998" not in out
    code, out, _ = vidlada("--check", "--tasks", "lvbench", "--data-root", root)
    assert "Everything is there." in out
    code, out, _ = vidlada("--check", "--tasks", "lvbench", "--data-root", tmp_path / "nowhere")
    assert code == 0 and "lmms-eval/LVBench is not below" in out


def test_hf_home_is_the_root(root, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(root))
    assert "Everything is there." in vidlada("--check", "--tasks", "videomme")[1]


def test_the_hub_s_own_cache(root, tmp_path):
    snapshot = tmp_path / "hub/datasets--lmms-eval--LVBench/snapshots/abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(root / "lmms-eval/LVBench")
    assert repository_folder(tmp_path, "lmms-eval/LVBench") == snapshot
    assert len(documents(snapshot, None, "train")) == 2


def test_layouts_of_datasets(tmp_path):
    (tmp_path / "json").mkdir()
    (tmp_path / "json/count.json").write_text('[{"a": 1}]')
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: count\n  data_files: json/count.json\n---\ntext")
    assert documents(tmp_path, "count", "train") == [{"a": 1}]
    with pytest.raises(InputError, match="no files of the test split of other"):
        documents(tmp_path, "other", "test")
    (tmp_path / "README.md").write_text("---\n{: damaged\n---\n")
    with pytest.raises(InputError, match="damaged"):
        documents(tmp_path, "count", "train")
    (tmp_path / "README.md").unlink()
    (tmp_path / "test-00000-of-00001.jsonl").write_text('{"a": 2}\n')
    assert documents(tmp_path, None, "test") == [{"a": 2}]
    (tmp_path / "test-00000-of-00001.jsonl").write_text('{"a":')
    with pytest.raises(InputError, match="cannot be read"):
        documents(tmp_path, None, "test")


def test_miniatures_overwrite_nothing(root):
    code, _, err = vidlada("--miniature", root, "--tasks", "lvbench")
    assert code == 2 and "in use" in err


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "--tasks"),
        (["--tasks", "videomme"], "--output"),
        (["--tasks", "nextqa", "--output", "x"], "nextqa"),
        (["--tasks", "lvbench", "--output", "x", "--gen", "gen_length"], "name=value"),
        (["--tasks", "lvbench", "--output", "x", "--model", "nowhere"], "nowhere"),
        (["--compare", "nowhere", "--compare", "x"], "not the folder of a run"),
    ],
)
def test_bad_command_lines_end_in_one_line(arguments, named, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(root))
    code, _, err = vidlada(*arguments)
    assert code == 2 and named in err and err.count("\n") == 1


def test_without_lmms_eval(root, tmp_path, monkeypatch):
    monkeypatch.setattr(running.importlib.util, "find_spec", lambda name: None)
    code, _, err = vidlada("--tasks", "lvbench", "--data-root", root, "--output", tmp_path / "run")
    assert code == 2 and "make eval-env" in err and not (tmp_path / "run").exists()


def test_failures_of_lmms_eval_are_told(tmp_path):
    start_run(tmp_path / "run", RunSettings("tiny"), chosen("lvbench"))
    program = "print('ERROR - Error during evaluation: no disk'); raise SystemExit({})"
    with pytest.raises(VidLaDAError, match="code 3.*no disk"):
        running.execute([sys.executable, "-c", program.format(3)], tmp_path, tmp_path / "run", {})


def test_lmms_eval_sees_the_questions_and_no_folder_named_like_a_task(root, tmp_path):
    folder = running.link_questions(tmp_path, root, chosen("egoschema,lvbench"))
    assert [path.name for path in folder.iterdir()] == ["lmms-eval"] and (root / "egoschema").is_dir()
    assert len(documents(folder / "lmms-eval/egoschema", "Subset", "test")) == 2
    running.link_questions(tmp_path, tmp_path / "moved", chosen("lvbench"))
    assert not (folder / "lmms-eval/LVBench").exists()


def test_submission(root, tmp_path):
    below = tmp_path / "lmms-eval" / "tiny"
    below.mkdir(parents=True)
    (below / "20260101_000000_results.json").write_text("{}")
    lines = [{"doc_id": 0, "filtered_resps": "B"}, {"doc_id": 1, "filtered_resps": "right"}]
    (below / "20260101_000000_samples_egoschema.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    running.write_submission(tmp_path, root, BENCHMARKS["egoschema"])
    rows = documents(root / "lmms-eval/egoschema", "GENERATION", "test")
    assert json.loads((tmp_path / SUBMISSION_FILE).read_text()) == {
        rows[0]["video_idx"]: 1,
        rows[1]["video_idx"]: -1,
    }


@pytest.mark.parametrize("answer, place", [("B", 1), ("(C)", 2), ("The answer is D.", 3), ("right", -1), ("", -1)])
def test_letters(answer, place):
    assert letter_place(answer) == place
