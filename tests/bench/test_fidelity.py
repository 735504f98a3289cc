"""How far caches stray from full recompute, on clips of the shapes world and the shipped model."""

import json

import pytest
from click.testing import CliRunner

from vidlada.bench.fidelity import fidelity_figures, fidelity_table
from vidlada.cli import main
from vidlada.errors import InputError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    options = ["--split", "validation", "--clips", "1", "--seconds", "6", "--questions", "2"]
    assert CliRunner().invoke(main, ["shapes", "write", str(folder), *options]).exit_code == 0
    return folder


def test_exact_caches_do_not_stray_and_others_do(data):
    options = ["--cache", "full", "--cache", "dual", "--cache", "mars:text=1,ratio=1,pyramid=1,window=-1"]
    lengths = ["--gen-length", "32", "--block-length", "16", "--dtype", "float32"]
    done = CliRunner().invoke(main, ["bench", "fidelity", str(data / "validation.json"), "--json", *options, *lengths])
    assert done.exit_code == 0, done.stderr
    figures = json.loads(done.stdout)
    full, dual, mars = figures["rows"]
    for exact in (full, mars):
        assert exact["millinats"] == pytest.approx(0, abs=1e-3)
        assert exact["same_percent"] == 100
        assert exact["work_percent"] == pytest.approx(100)
    assert dual["millinats"] > 0.01
    assert dual["work_percent"] < 50
    assert fidelity_table(figures).count("\n| ") == 4


def test_questions_without_long_answers_are_refused(data, small):
    entries = [entry for entry in json.loads((data / "validation.json").read_text()) if entry["choices"]]
    with pytest.raises(InputError, match="no question with a long answer"):
        fidelity_figures(small, entries, data, ["full"])
