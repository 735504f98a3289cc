"""The run for the day a GPU is there, in small on a CPU, with a Python that has torch and transformers only."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from vidlada.bench.gpu import Results, bench_gpu, report_text, run_stage
from vidlada.bench.gpu_session import Figure, Session, Stage
from vidlada.bench.gpu_stages import STAGES
from vidlada.cli import main
from vidlada.errors import InputError

ROOT = Path(__file__).parents[2]
UNNEEDED = {"click", "pydantic", "pydantic_core", "typer", "rich"}  # transformers depends on them for its command


def required(names):
    """Distributions and what they depend on."""
    found, left = {}, list(names)
    while left:
        try:
            distribution = metadata.distribution(left.pop())
        except metadata.PackageNotFoundError:
            continue
        if distribution.name not in found:
            found[distribution.name] = distribution
            needs = [need for need in distribution.requires or () if "extra ==" not in need]
            left += [re.match(r"[\w.-]+", need)[0] for need in needs]
    return found.values()


@pytest.fixture
def bare(tmp_path):
    """A folder of packages with torch, transformers and what they need."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for distribution in required(["torch", "transformers"]):
        for top in {file.parts[0] for file in distribution.files} - UNNEEDED - {".."}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    assert not (folder / "av").exists()
    assert not (folder / "PIL").exists()
    return folder


@pytest.mark.slow
def test_a_bare_python_runs_all_of_it(bare, tmp_path):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": f"{bare}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-S", "-m", "vidlada.bench.gpu", "--out", str(out), "--device", "cpu", "--size", "tiny"]
    command += ["--minutes", "30"]  # a busy machine may be slow
    stages = [name for name in STAGES if name not in ("graphs", "machine")]  # compilation and rates take minutes
    chosen = [word for name in stages for word in ("--stage", name)]
    done = subprocess.run([*command, *chosen], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert list(report["stages"]) == stages
    for name, results in report["stages"].items():
        assert results["rows"], name
        assert not results["left"]
        assert name == "weights" or not results["errors"], results["errors"]  # no torchao there
    for name in ("vectors", "policies"):
        rows = report["stages"][name]["rows"]
        assert all(row["measured"] == row["predicted"] for row in rows if row["what"] == "same ids")
    assert "| case | figure | predicted | measured | unit |" in (out / "report.md").read_text()


def cases(session):
    def fails():
        raise RuntimeError("no such\nkernel")

    yield "good", lambda: [Figure("time", "s", 1.0, 2.0)]
    yield "bad", fails


def test_results_are_kept_and_failures_tried_again(tmp_path, monkeypatch):
    session = Session.of("cpu", "tiny", None, ROOT / "tests")
    monkeypatch.setitem(STAGES, "vision", Stage("A try.", 1, cases))
    first = run_stage("vision", session, tmp_path)
    assert [row["case"] for row in first.rows] == ["good"]
    assert first.errors == {"bad": "RuntimeError: no such"}
    kept = json.loads((tmp_path / "vision.json").read_text())
    kept["rows"][0]["measured"] = 3.0
    (tmp_path / "vision.json").write_text(json.dumps(kept))
    again = run_stage("vision", session, tmp_path)
    assert [row["measured"] for row in again.rows] == [3.0]
    assert again.errors == first.errors
    assert Results.read(tmp_path / "vision.json").errors == first.errors  # for the report of a run of other stages
    (tmp_path / "other").mkdir()
    late = run_stage("vision", session, tmp_path / "other", minutes=-1)
    assert late.left == ["good", "bad"]
    text = report_text({"machine": "a CPU"}, {"vision": again})
    assert "| good | time | 1 | 3 | s |" in text
    assert "bad: failed: RuntimeError" in text


def test_what_cannot_be_run_is_said_in_a_line(tmp_path):
    with pytest.raises(InputError, match="unknown stage"):
        bench_gpu(tmp_path, "cpu", "tiny", stages=["flights"])
    (tmp_path / "report.json").write_text(json.dumps({"facts": {"machine": "another"}}))
    with pytest.raises(InputError, match="results of another machine"):
        bench_gpu(tmp_path, "cpu", "tiny", stages=["vectors"])
    shown = CliRunner().invoke(main, ["bench", "gpu", "--out", str(tmp_path), "--device", "cpu", "--stage", "flights"])
    assert shown.exit_code == 2
    assert "unknown stage flights" in shown.output
    assert Results.read(tmp_path / "nothing.json").rows == []
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(InputError, match="empty.json holds no results of a stage"):
        Results.read(tmp_path / "empty.json")
    for options, message in (
        ({"frames": -3}, "at least 1 frame, not -3"),
        ({"frames": 0}, "at least 1 frame, not 0"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"out": tmp_path / "empty.json"}, "empty.json cannot be used as a folder"),
    ):
        with pytest.raises(InputError, match=message):
            bench_gpu(**{"out": tmp_path / "new", "device": "cpu", "size": "tiny", **options})


def test_budgets_fit_into_forty_minutes():
    assert sum(stage.minutes for stage in STAGES.values()) < 40
