"""The decoding benchmark on its smallest input: what it reports, not how long anything takes."""

import json

import pytest
from click.testing import CliRunner

from vidlada.bench.decoding import decoding_figures, decoding_table
from vidlada.bench.passes import PASSES, pass_figures, pass_table, scaling_figures, scaling_table
from vidlada.bench.weights import Weights, weights_figures, weights_table
from vidlada.cli import main
from vidlada.errors import InputError

pytestmark = pytest.mark.slow

SMALL = {"frames": 2, "gen_length": 4, "block_length": 2}
SEQUENCE = 2 * 32 + 2 * 200 + 4
MARS = "mars:text=2,ratio=1,pyramid=1"


def rows_of(figures):
    return {(row["cache"], row["pace"]): row for row in figures["rows"]}


def test_figures_are_of_every_cache():
    figures = decoding_figures("mid", caches=["full", "frozen", MARS], tokens_per_step=None, repeats=2, **SMALL)
    rows = {cache: row for (cache, _), row in rows_of(figures).items()}
    assert list(rows) == ["none", "full", "frozen", MARS]
    assert rows["none"]["times_faster"] == 1
    assert rows["full"]["agreement"] == 1
    assert rows["none"]["layer_tokens"] == rows["full"]["layer_tokens"] == [4 * SEQUENCE] * 8
    assert rows["frozen"]["layer_tokens"] == [SEQUENCE + 3 * 4] * 8
    assert rows[MARS]["refreshes"] == {"text": 2, "visual": 2}
    for row in rows.values():
        assert row["least_s"] <= row["total_s"] <= row["most_s"]
        assert 0 < row["first_step_s"] <= row["first_token_s"] <= row["most_s"]
        assert row["tokens_per_second"] == pytest.approx(4 / row["total_s"])
    assert decoding_table(figures).count("\n| ") == 5


def test_faster_paces():
    random = rows_of(decoding_figures("mid", caches=["frozen"], tokens_per_step=2, **SMALL))
    assert random["frozen", "1 token"]["steps"] == 4
    assert random["frozen", "2 tokens"]["steps"] == 2
    shipped = decoding_figures("tiny", frames=2, caches=["full"], gen_length=16, block_length=16, threshold=0.01)
    rows = rows_of(shipped)
    assert shipped["visual_tokens"] == 2 * 12
    assert rows["none", "threshold 0.01"]["steps"] < rows["none", "1 token"]["steps"]
    assert rows["full", "threshold 0.01"]["agreement"] == 1


def test_bad_settings_are_refused_before_anything_is_measured():
    lines = []
    with pytest.raises(InputError, match="anchors"):
        decoding_figures("mid", caches=["mars:window=1,anchors=1000"], progress=lines.append, **SMALL)
    assert lines == ["making the model"]
    with pytest.raises(InputError, match="unknown cache"):
        decoding_figures("mid", caches=["lazy"], **SMALL)
    with pytest.raises(InputError, match="2 to 60 s, not 61"):
        decoding_figures("tiny", frames=61)


def test_a_full_pass_is_the_one_of_transformers():
    figures = pass_figures("mid", frames=1, repeats=1)
    assert [row["way"] for row in figures["rows"]] == list(PASSES)
    assert figures["tokens"] == 264
    assert figures["largest_difference"] < 1e-4
    assert pass_table(figures).count("\n| ") == 4


def test_scaling():
    figures = scaling_figures("mid", [1, 2])
    first, second = figures["rows"]
    assert (first["visual_tokens"], second["visual_tokens"]) == (200, 400)
    assert second["key_value_bytes"] - first["key_value_bytes"] == 200 * 8 * 2 * 512 * 4
    assert scaling_table(figures).count("\n| ") == 3


def test_weights():
    kinds = [Weights("float32"), Weights("float32", "int8"), Weights("bfloat16", "int8-dynamic")]
    figures = weights_figures("tiny", frames=2, kinds=kinds, repeats=1)
    assert [row["weights"] for row in figures["rows"]] == ["float32", "float32, int8", "bfloat16, int8-dynamic"]
    assert figures["rows"][0]["cached_times_faster"] == 1
    assert weights_table(figures).count("\n| ") == 4


def test_command_line(tmp_path):
    arguments = ["--frames", "2", "--gen-length", "2", "--block-length", "2", "--cache", "dual", "--json"]
    plot = tmp_path / "totals.svg"
    done = CliRunner().invoke(main, ["bench", "decode", *arguments, "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert [row["cache"] for row in rows] == ["none", "dual", "none", "dual"]
    assert "times faster than full recompute" in plot.read_text()
    again = CliRunner().invoke(main, ["bench", "decode", *arguments, "--plot", str(plot)])
    assert again.exit_code == 2
    assert "exists" in again.stderr
