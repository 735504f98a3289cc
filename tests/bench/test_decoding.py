"""The decoding benchmark on its smallest input: what it reports, not how long anything takes."""

import json

import pytest
from click.testing import CliRunner

from vidlada.bench.decoding import decoding_figures, decoding_table
from vidlada.cli import main
from vidlada.errors import InputError

SMALL = {"frames": 2, "gen_length": 4, "block_length": 2}
SEQUENCE = 2 * 32 + 2 * 200 + 4


def test_figures_are_of_every_cache():
    figures = decoding_figures("mid", caches=["full", "frozen", "mars:text=2,ratio=1,pyramid=1"], repeats=2, **SMALL)
    rows = figures["caches"]
    assert list(rows) == ["none", "full", "frozen", "mars:text=2,ratio=1,pyramid=1"]
    assert rows["none"]["times_faster"] == 1
    assert rows["full"]["agreement"] == 1
    assert rows["none"]["layer_tokens"] == rows["full"]["layer_tokens"] == [4 * SEQUENCE] * 8
    assert rows["frozen"]["layer_tokens"] == [SEQUENCE + 3 * 4] * 8
    assert rows["mars:text=2,ratio=1,pyramid=1"]["refreshes"] == {"text": 2, "visual": 2}
    for row in rows.values():
        assert row["least_s"] <= row["total_s"] <= row["most_s"]
        assert row["tokens_per_second"] == pytest.approx(4 / row["total_s"])
    assert decoding_table(figures).count("\n| ") == 5


def test_bad_settings_are_refused_before_anything_is_measured():
    said = []
    with pytest.raises(InputError, match="anchors"):
        decoding_figures("mid", caches=["mars:anchors=1000"], progress=said.append, **SMALL)
    assert said == ["making the model"]
    with pytest.raises(InputError, match="unknown cache"):
        decoding_figures("mid", caches=["lazy"], **SMALL)


def test_command_line():
    arguments = ["--frames", "2", "--gen-length", "2", "--block-length", "2", "--cache", "dual", "--json"]
    done = CliRunner().invoke(main, ["bench", "decode", *arguments])
    assert done.exit_code == 0
    assert list(json.loads(done.stdout)["caches"]) == ["none", "dual"]
