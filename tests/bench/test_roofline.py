"""Predictions, against what a pretended GPU counts."""

import json
import math

import pytest
from click.testing import CliRunner

from vidlada.bench.roofline import plan_figures, steps_of
from vidlada.cli import main
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.model.config import VidLaDAConfig


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "dual", "prefix", "frozen", "mars", "interval", "dkv"])
def test_the_arithmetic_is_what_is_counted(cache):
    from vidlada.bench.count import TEXT_TOKENS, count_work

    _, counted = count_work("8b", cache, frames=4, steps=6)
    settings = GenerationSettings(gen_length=128, block_length=32, cache=cache)
    steps = steps_of(VidLaDAConfig(), 4 * 210, settings, 1, text_tokens=2 * TEXT_TOKENS)
    for work, step in zip(counted, steps, strict=False):
        assert step.operations == pytest.approx(work.flops, rel=0.05)


def test_more_answers_take_longer_together_and_less_each():
    config = VidLaDAConfig()
    settings = GenerationSettings(gen_length=128, block_length=32, cache="mars")
    one, many = (plan_figures(config, 8_400_000_000, "h200", 64, count, settings) for count in (1, 4))
    assert one["latency_s"] < many["batch_s"] < 4 * one["latency_s"]
    assert many["tokens_per_second"] > one["tokens_per_second"]
    small = plan_figures(config, 8_400_000_000, "h200", 64, 4, settings.replace(kv_dtype="int8"), quantization="int4")
    assert 0.3 * one["weights_gib"] < small["weights_gib"] < 0.4 * one["weights_gib"]
    assert small["request_gib"] < 0.7 * one["request_gib"]
    fewer = plan_figures(config, 8_400_000_000, "h200", 64, 1, settings.replace(visual_keep=0.25))
    assert fewer["first_step_s"] < 0.4 * one["first_step_s"]
    pruned = plan_figures(config, 8_400_000_000, "h200", 64, 1, settings.replace(visual_prune="redvtp"))
    assert pruned["first_step_s"] == one["first_step_s"] and pruned["latency_s"] < one["latency_s"]
    with pytest.raises(InputError, match="no prediction for quantize int3"):
        plan_figures(config, 1, "h200", 1, 1, settings, quantization="int3")
    assert one["weights_gib"] == pytest.approx(15.6, abs=0.1)
    crowd = plan_figures(config, 8_400_000_000, "rtx4090", 64, 16, settings)
    assert crowd["concurrency"] < 16
    with pytest.raises(InputError, match="unknown device"):
        plan_figures(config, 1, "abacus", 1, 1, settings)


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_the_bytes_are_what_is_counted(kind):
    """Of keys and values in 8 bits: read, written wide, read again."""
    from vidlada.bench.count import TEXT_TOKENS, count_work

    settings = GenerationSettings(gen_length=128, block_length=32, cache="frozen", kv_dtype=kind)
    *_, counted = count_work("8b", "frozen", frames=64, steps=3, kv_dtype=kind)[1]
    *_, step = steps_of(VidLaDAConfig(), 64 * 210, settings, 1, text_tokens=2 * TEXT_TOKENS)
    assert step.weights + step.keys_values + step.states == pytest.approx(counted.read_written, rel=0.1)


def test_what_cannot_be_is_not_planned():
    config, settings = VidLaDAConfig(), GenerationSettings(cache="mars")
    crowded = plan_figures(config, 8_400_000_000, "rtx4090", 64, 1, settings, questions_per_hour=1000)
    assert not crowded["fits"] and crowded["gpus"] is None and "over 2 devices" in crowded["advice"]
    with pytest.raises(InputError, match="200 frames and 128 slots take 42256 tokens, more than the model's 32768"):
        plan_figures(config, 8_400_000_000, "h200", 200, 1, settings)
    for number in (math.inf, math.nan):
        with pytest.raises(InputError, match="questions_per_hour must be a number above 0"):
            plan_figures(config, 8_400_000_000, "h200", 64, 1, settings, questions_per_hour=number)


def test_the_command(small_folder):
    printed = CliRunner().invoke(main, ["plan", "--frames", "64", "--concurrency", "4", "--questions-per-hour", "1e6"])
    assert printed.exit_code == 0
    assert printed.output.startswith("Predicted, not measured") and printed.output.count("(predicted)") == 6
    options = ["plan", "--model", str(small_folder), "--frames", "4", "--json"]
    assert json.loads(CliRunner().invoke(main, options).output)["fits"]
