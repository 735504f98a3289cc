"""The frontier of caches and commit rules, from the command line."""

import json

import pytest
from click.testing import CliRunner

from vidlada.bench.quality import quality_table
from vidlada.cli import main

pytestmark = pytest.mark.slow


def test_every_pair_and_variation_is_measured_against_full_recompute(tmp_path):
    options = ["--split", "validation", "--clips", "1", "--seconds", "3", "--questions", "2"]
    assert CliRunner().invoke(main, ["shapes", "write", str(tmp_path), *options]).exit_code == 0
    caches = ["--cache", "none", "--cache", "dual", "--rule", "factor", "--also", "visual_keep=0.5"]
    done = CliRunner().invoke(main, ["bench", "quality", str(tmp_path / "validation.json"), *caches, "--json"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    first, *rows = figures["rows"]
    assert (first["cache"], first["commit"], first["same_percent"], first["work_percent"]) == ("none", "topk", 100, 100)
    pairs = [("none", "factor"), ("dual", "factor")]
    assert [(row["cache"], row["commit"]) for row in rows] == 2 * pairs
    assert [row["changes"] for row in rows] == 2 * [{}] + 2 * [{"visual_keep": 0.5}]
    assert all(row["work_percent"] < 100 and row["passes"] <= first["passes"] for row in rows)
    assert any(row["frontier"] for row in figures["rows"])
    assert quality_table(figures).count("\n| ") == 1 + 5
