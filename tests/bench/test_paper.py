"""The paper's table and ablation: every row is measured, with answers where questions are given."""

import json

import pytest
from click.testing import CliRunner

from vidlada.bench.paper import ROWS, paper_table
from vidlada.cli import main

pytestmark = pytest.mark.slow


def test_every_row_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("vidlada.bench.paper.SLOTS", 64)  # instead of 128: half of the time
    options = ["--split", "validation", "--clips", "1", "--seconds", "6", "--questions", "1"]
    assert CliRunner().invoke(main, ["shapes", "write", str(tmp_path), *options]).exit_code == 0
    questions = ["--questions", str(tmp_path / "validation.json")]
    done = CliRunner().invoke(main, ["bench", "paper", "--size", "tiny", "--frames", "4", *questions, "--json"])
    assert done.exit_code == 0, done.stderr
    figures = json.loads(done.stdout)
    rows = {row["cache"]: row for row in figures["speed"]["rows"] if row["pace"] == "1 token"}
    assert rows.keys() == set(ROWS.values())
    assert rows["none"]["times_faster"] == 1
    # answers, and with them steps, may differ
    work = {cache: row["layer_tokens"][-1] / row["steps"] for cache, row in rows.items()}
    assert work["mars:paper,ratio=8"] < work["mars:paper,ratio=1"] < work["none"]
    assert {row["cache"] for row in figures["quality"]["rows"]} == set(ROWS.values())
    lines = paper_table(figures).split("\n")
    assert len(lines) == 4 + len(ROWS) and lines[4].startswith("| full recompute | none |")
    without = paper_table({**figures, "quality": None})
    assert "captions" not in without and without.count("\n| ") == 1 + len(ROWS)
