"""What runs with which settings, what data is there, what the command line refuses; lmms-eval is not needed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vidlada
from vidlada.errors import InputError, VidLaDAError
from vidlada.evaluation import run as running
from vidlada.evaluation.benchmarks import select_benchmarks
from vidlada.evaluation.data import documents
from vidlada.evaluation.folder import lock_run, open_record, read_run_file
from vidlada.evaluation.run import RunSettings, command, plan_launches, start_run

pytestmark = pytest.mark.slow


def options_after(arguments, name):
    return arguments[arguments.index(name) + 1]


def test_paper_preset():
    first, second, third = plan_launches(select_benchmarks("paper"), RunSettings("tiny"))
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


def test_changes_replace_the_preset():
    changed = RunSettings("tiny", model_changes={"cache": "mars:text=8,ratio=2", "threshold": 0.9, "max_frames_num": 8},
                          generation_changes={"gen_length": 32, "block_length": 16, "temperature": 0.5})  # fmt: skip
    (launch,) = plan_launches(select_benchmarks("lvbench"), changed)
    assert "gen_steps" not in launch.generation_arguments and launch.generation_arguments["do_sample"] is True
    text = options_after(command(launch, changed, Path("/out"), processes=2), "--model_args")
    assert "cache=mars:text=8;ratio=2" in text and "threshold=0.9" in text and "max_frames_num=8" in text
    assert plan_launches(select_benchmarks("lvbench"), RunSettings("tiny", "task"))[0].generation_arguments == {}


def test_longer_answers_get_a_step_a_token():
    (launch,) = plan_launches(select_benchmarks("lvbench"), RunSettings("tiny", generation_changes={"gen_length": 32}))
    assert launch.generation_arguments["gen_length"] == 32
    assert not {"block_length", "gen_steps"} & set(launch.generation_arguments)


@pytest.mark.parametrize("changes", [{"cache": "nonsense"}, {"threshold": 7.0}, {"dtype": None, "nonsense": 1}])
def test_bad_settings_stop_before_anything_starts(changes):
    with pytest.raises(InputError):
        plan_launches(select_benchmarks("lvbench"), RunSettings("tiny", model_changes=changes))


def test_unknown_tasks_are_named():
    with pytest.raises(InputError, match="unknown task nextqa"):
        select_benchmarks("videomme,nextqa")
    with pytest.raises(InputError, match="unknown task"):
        select_benchmarks(" , ")


def test_a_folder_keeps_to_its_settings(tmp_path, monkeypatch):
    start_run(tmp_path / "run", RunSettings("tiny"), select_benchmarks("lvbench"))
    start_run(tmp_path / "run", RunSettings("tiny"), select_benchmarks("mlvu_dev"))
    about = read_run_file(tmp_path / "run")
    assert about["tasks"] == ["lvbench", "mlvu_dev"] and about["versions"]["torch"]
    assert about["arguments"]["lvbench"]["generation"]["gen_steps"] == 2
    with pytest.raises(InputError, match="another limit"):
        start_run(tmp_path / "run", RunSettings("tiny", limit=3), select_benchmarks("lvbench"))
    monkeypatch.setattr(running, "weights_fingerprint", lambda folder: "trained further")
    with pytest.raises(InputError, match="another weights"):
        start_run(tmp_path / "run", RunSettings("tiny"), select_benchmarks("lvbench"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="in use"):
        start_run(tmp_path / "other", RunSettings("tiny"), select_benchmarks("lvbench"))


def test_fingerprints_tell_weights_apart(small_folder, tmp_path):
    copy = Path(shutil.copytree(small_folder, tmp_path / "copy"))
    assert running.weights_fingerprint(copy) == running.weights_fingerprint(small_folder)
    (weights,) = copy.glob("*.safetensors")
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert running.weights_fingerprint(copy) != running.weights_fingerprint(small_folder)


def test_fingerprints_tell_adapters_apart(small_folder, adapter, tmp_path):
    fingerprint = running.weights_fingerprint
    assert len({fingerprint(small_folder), fingerprint(adapter)}) == 2
    assert fingerprint(adapter) == fingerprint(small_folder, adapter)  # the base it names, and the same base given
    settings = RunSettings(str(small_folder), model_changes={"adapter": str(adapter)})
    start_run(tmp_path / "run", settings, select_benchmarks("lvbench"))
    with pytest.raises(InputError, match="another weights"):
        start_run(tmp_path / "run", RunSettings(str(small_folder)), select_benchmarks("lvbench"))
    (launch,) = plan_launches(select_benchmarks("lvbench"), settings)
    text = options_after(command(launch, settings, Path("/out")), "--model_args")
    assert f"pretrained={small_folder}," in text and f"adapter={adapter}" in text


def test_an_adapter_for_a_given_base(small_folder, small, adapter, tmp_path):
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone"}))
    with pytest.raises(InputError, match="/gone"):
        vidlada.load(moved)
    question, settings = "is it red ?", {"gen_length": 8, "block_length": 8}
    beside, named = vidlada.load(small_folder, adapter=moved), vidlada.load(adapter)
    answer = beside.ask(None, question, **settings).token_ids
    assert answer == named.ask(None, question, **settings).token_ids != small.ask(None, question, **settings).token_ids
    with pytest.raises(InputError, match="no such adapter folder"):
        vidlada.load(small_folder, adapter=tmp_path / "nowhere")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["run"], "--tasks"),
        (["download"], "--tasks"),
        (["run", "--tasks", "videomme"], "--output"),
        (["run", "--tasks", "nextqa", "--output", "x"], "nextqa"),
        (["run", "--tasks", "lvbench", "--output", "x", "--gen", "gen_length"], "name=value"),
        (["run", "--tasks", "lvbench", "--output", "x", "--gen", 'stop=["a'], "cannot be read"),
        (["run", "--tasks", "lvbench", "--output", "x", "--model", "nowhere"], "nowhere"),
        (["run", "--tasks", "lvbench", "--output", "x", "--shapes-clips", 3], "--shapes-clips is of the task shapes"),
        (["run", "--tasks", "shapes", "--output", "x", "--shapes-clips", 3], "1 clips are in"),
        (["report", "nowhere"], "not the folder of a run"),
        (["compare", "nowhere", "x"], "not the folder of a run"),
        (["compare"], "two runs"),
    ],
)
def test_bad_command_lines_end_in_one_line(arguments, named, root, tmp_path, monkeypatch, vidlada_eval):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(root))
    code, _, err = vidlada_eval(*arguments)
    assert code == 2 and named in err and err.count("\n") == 1


def test_a_refused_run_writes_no_clips(tmp_path, vidlada_eval):
    root = tmp_path / "root"
    root.mkdir()
    code, _, err = vidlada_eval("run", "--tasks", "shapes,lvbench", "--data-root", root, "--output", tmp_path / "run")
    assert code == 2 and "lvbench" in err and not list(root.iterdir())


def test_without_lmms_eval(root, tmp_path, monkeypatch, vidlada_eval):
    monkeypatch.setattr(running.importlib.util, "find_spec", lambda name: None)
    code, _, err = vidlada_eval("run", "--tasks", "lvbench", "--data-root", root, "--output", tmp_path / "run")
    assert code == 2 and "make eval-env" in err and not (tmp_path / "run").exists()


def test_failures_of_lmms_eval_are_reported(tmp_path):
    start_run(tmp_path / "run", RunSettings("tiny"), select_benchmarks("lvbench"))
    program = "print('ERROR - Error during evaluation: no disk'); raise SystemExit({})"
    with lock_run(tmp_path / "run") as lock, pytest.raises(VidLaDAError, match="code 3.*no disk"):
        running.execute([sys.executable, "-c", program.format(3)], tmp_path, tmp_path / "run", {}, lock)


def test_a_folder_is_for_one_command_at_a_time(root, tmp_path, monkeypatch, vidlada_eval):
    monkeypatch.setattr(running, "require_lmms_eval", lambda: None)
    output = tmp_path / "run"
    start_run(output, RunSettings("tiny"), select_benchmarks("lvbench"))
    with lock_run(output) as lock:
        left = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    options = ["run", "--tasks", "lvbench", "--data-root", root, "--output", output]
    code, _, err = vidlada_eval(*options)  # lmms-eval goes on after its command was killed
    assert code == 2 and "another run is going on in it" in err
    left.communicate(b"\n", timeout=60)
    with lock_run(output):
        pass


def test_a_folder_is_in_use_while_a_process_answers(tmp_path):
    """torchrun's processes survive a `kill -9` of all that holds the lock."""
    start_run(tmp_path / "run", RunSettings("tiny"), select_benchmarks("lvbench"))
    refused = pytest.raises(InputError, match="another run is going on in it")
    with open_record(tmp_path / "run", 1), open_record(tmp_path / "run", 0), refused, lock_run(tmp_path / "run"):
        pass
    with lock_run(tmp_path / "run"), open_record(tmp_path / "run", 0):
        pass


def test_lmms_eval_sees_the_questions_and_no_folder_named_like_a_task(root, tmp_path):
    folder = running.link_questions(tmp_path, root, select_benchmarks("egoschema,lvbench"))
    assert folder == tmp_path / "cache/questions"
    assert [path.name for path in folder.iterdir()] == ["lmms-eval"] and (root / "egoschema").is_dir()
    assert len(documents(folder / "lmms-eval/egoschema", "Subset", "test")) == 2
    running.link_questions(tmp_path, tmp_path / "moved", select_benchmarks("lvbench"))
    assert not (folder / "lmms-eval/LVBench").exists()


def test_only_what_is_there_is_launched():
    benchmarks = select_benchmarks("lvbench,video_mmmu,mlvu_dev")
    (launch,) = plan_launches(benchmarks, RunSettings("tiny"), {"lvbench", "video_mmmu_perception"})
    assert launch.tasks == ("video_mmmu_adaptation", "video_mmmu_comprehension", "mlvu_dev")
    assert plan_launches(benchmarks[:1], RunSettings("tiny"), {"lvbench"}) == []


@pytest.mark.parametrize("skip", [False, True])
def test_missing_data_is_skipped_on_request(root, tmp_path, monkeypatch, vidlada_eval, skip):
    """One benchmark lacks its questions, another one of its two videos."""
    data = tmp_path / "data"
    shutil.copytree(root / "sy1998/MLVU_dev", data / "sy1998/MLVU_dev")
    shutil.copytree(root / "mlvu", data / "mlvu")
    missing = min((data / "mlvu").rglob("*.mp4"))
    missing.unlink()
    monkeypatch.setattr(running, "require_lmms_eval", lambda: None)
    monkeypatch.setattr(running, "keep_interrupted", lambda cache: None)
    launched = []

    def execute(arguments, place, output, variables, lock):
        launched.append(arguments)
        (output / "lmms-eval.log").touch()

    monkeypatch.setattr(running, "execute", execute)
    options = ["--tasks", "lvbench,mlvu_dev", "--data-root", data, "--output", tmp_path / "run"]
    code, _, err = vidlada_eval("run", *options, *(["--skip-missing"] if skip else []))
    if not skip:
        assert code == 2 and "lvbench: lmms-eval/LVBench is not below" in err and "--skip-missing" in err
        return
    assert options_after(launched[0], "--tasks") == "mlvu_dev"
    assert "lvbench is left out: " in err and "their questions are left out" in err
    assert code == 1 and "no results for mlvu_dev" in err  # of the lmms-eval that did nothing
    skipped = read_run_file(tmp_path / "run")["skipped"]
    assert skipped["mlvu_dev"] == {"problem": None, "videos": [str(missing.relative_to(data))]}
    assert "is not below" in skipped["lvbench"]["problem"]


def test_nothing_left_to_evaluate(tmp_path, monkeypatch, vidlada_eval):
    monkeypatch.setattr(running, "require_lmms_eval", lambda: None)
    options = ["--tasks", "lvbench", "--data-root", tmp_path, "--output", tmp_path / "run", "--skip-missing"]
    code, _, err = vidlada_eval("run", *options)
    assert code == 2 and "nothing is left to evaluate" in err and not (tmp_path / "run").exists()


def test_help_comes_in_groups(vidlada_eval):
    code, out, _ = vidlada_eval("--help")
    assert code == 0 and all(f"\n  {name} " in out for name in ("check", "download", "run", "report", "compare"))
    out = vidlada_eval("run", "--help")[1]
    headings = [line[:-1] for line in out.splitlines() if line and line[0] != " " and line.endswith(":")]
    assert headings == ["Common", "Output", "Model", "Video", "Prompt", "Decoding"]
