"""Settings of whole evaluations, by name."""

from typing import Any, Literal

from vidlada.evaluation.benchmarks import Benchmark

PresetName = Literal["paper", "task"]


def model_arguments(preset: PresetName, benchmark: Benchmark) -> dict[str, Any]:
    """How videos are shown: 64 frames at most, one a second, and their times named to MVBench only."""
    return {
        "max_frames_num": 64,
        "video_fps": 1.0,
        "force_sample": False,
        "add_time_instruction": preset == "paper" and benchmark.name == "mvbench",
    }


def generation_arguments(preset: PresetName, benchmark: Benchmark) -> dict[str, Any]:
    """How answers are decoded.

    `paper`: two slots in two steps, greedy, without thinking, as the published script asks. `task`: as each task of
    lmms-eval says, one token a step. The shapes world, which the paper does not know, is always asked its own way.
    """
    if preset == "task" or benchmark.name == "shapes":
        return {}
    return {
        "gen_length": 2,
        "block_length": 2,
        "gen_steps": 2,
        "temperature": 0,
        "cfg": 0,
        "remasking": "low_confidence",
        "think_mode": "no_think",
    }
