"""What lmms-eval passes reaches the sampler or is refused by name."""

import pytest

from vidlada.errors import InputError
from vidlada.evaluation.arguments import ModelArguments, generation_settings
from vidlada.generation import GenerationSettings
from vidlada.video import Sampling

DEFAULTS = GenerationSettings()
TASK = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": ["\n\n"]}


def test_published_generation_arguments():
    published = {"temperature": 0, "cfg": 0, "remasking": "low_confidence", "gen_length": 2, "block_length": 2,
                 "gen_steps": 2, "think_mode": "no_think"}  # fmt: skip
    settings = generation_settings(DEFAULTS, {**TASK, **published})
    assert settings == GenerationSettings(gen_length=2, block_length=2, steps=2, stop=("\n\n",), think=False)


def test_task_arguments_alone():
    settings = generation_settings(DEFAULTS, TASK)
    assert (settings.gen_length, settings.block_length, settings.steps, settings.think) == (16, 16, None, None)
    assert settings.stop == ("\n\n",) and settings.temperature == 0


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"cfg": 1}, {"cfg_scale": 1.0}),
        ({"threshold": 0.9}, {"threshold": 0.9}),
        ({"factor": 1}, {"factor": 1.0}),
        ({"cache": "mars:text=8;ratio=2"}, {"cache": "mars:text=8,ratio=2"}),
        ({"seed": 3, "suffix": "."}, {"seed": 3, "suffix": "."}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.5}, {"temperature": 0.5}),
        ({"until": "."}, {"stop": (".",)}),
        ({"max_gen_toks": 64}, {"gen_length": 64}),
        ({"temperature": 0, "top_p": 0, "top_k": 1}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"max_gen_toks": 64, "gen_length": 32}, {"gen_length": 32}),
    ],
)
def test_every_argument_arrives(given, expected):
    settings = generation_settings(DEFAULTS, given)
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    "given, named",
    [
        ({"num_beams": 4}, "num_beams 4"),
        ({"top_k": 50}, "top_k 50"),
        ({"temperature": 0.7, "top_p": 0}, "top_p must be a number above 0"),
        ({"threshold": 0.9, "steps": 4}, "threshold"),
        ({"temperature": 0.7, "do_sample": False}, "do_sample False contradicts temperature 0.7"),
        ({"temperature": 0, "do_sample": True}, "contradicts"),
        ({"steps": 2, "gen_steps": 4}, "contradicts"),
        ({"nonsense": 1, "gen_length": 2}, "nonsense"),
        ({"think_mode": "hard"}, "hard"),
        ({"gen_length": 3, "block_length": 2}, "block_length 2"),
    ],
)
def test_what_has_no_counterpart_is_refused(given, named):
    with pytest.raises(InputError, match=named):
        generation_settings(DEFAULTS, given)


def test_the_last_pace_given_counts():
    quick = GenerationSettings(threshold=0.9)
    settings = generation_settings(quick, {"gen_length": 2, "block_length": 2, "steps": 2})
    assert (settings.threshold, settings.steps) == (None, 2)


def test_a_model_argument_is_not_displaced_unseen():
    given = {"threshold": 0.9, "cache": "mars"}
    defaults = GenerationSettings().replace(**given)
    two = {"gen_length": 2, "block_length": 2}
    with pytest.raises(InputError, match="threshold 0.9 has no effect beside gen_steps 2; leave one of them out"):
        generation_settings(defaults, {**two, "gen_steps": 2}, given)
    settings = generation_settings(defaults, {**two, "threshold": 0.5, "cache": "dual"}, given)
    assert (settings.threshold, settings.cache) == (0.5, "dual")
    assert generation_settings(defaults, two, given).threshold == 0.9


@pytest.mark.parametrize("given", [{"cache": "mars"}, {"commit": "wino"}])
def test_a_speed_does_not_replace_a_model_argument_unseen(given):
    defaults = GenerationSettings().replace(**given)
    with pytest.raises(InputError, match=r"has no effect beside speed 'fast'; leave one of them out"):
        generation_settings(defaults, {"speed": "fast"}, given)
    assert generation_settings(defaults, {"speed": "fast", **given}, given).speed == "fast"


def test_settings_of_a_rule_are_separated_as_those_of_a_cache():
    two = "credit:decay=0.8;confidence=0.7"
    expected = "credit:decay=0.8,confidence=0.7"
    assert generation_settings(DEFAULTS, {"commit": two}).commit == expected
    assert ModelArguments.from_dict({"commit": two, "speed": "fast"}).decoding == {"commit": expected, "speed": "fast"}


def test_model_arguments_of_published_scripts():
    arguments = ModelArguments.from_dict(
        {"pretrained": "there", "conv_template": "llava_llada", "model_name": "llava_vidlada", "max_frames_num": 64,
         "video_fps": 1, "add_time_instruction": False, "force_sample": False, "batch_size": "1", "device": None}
    )  # fmt: skip
    assert arguments.sampling == Sampling(1.0, 64, False) and arguments.batch_size == 1
    assert ModelArguments.from_dict({"torch_dtype": "float16"}).dtype == "float16"
    assert ModelArguments.from_dict({"cache": "mars:text=8;ratio=2"}).decoding == {"cache": "mars:text=8,ratio=2"}


@pytest.mark.parametrize(
    "given, named",
    [
        ({"pretraind": "x"}, "pretraind"),
        ({"max_frames_num": 0}, "at least 1"),
        ({"video_fps": 0}, "fps"),
        ({"force_sample": "yes"}, "force_sample"),
        ({"conv_template": "qwen"}, "qwen"),
        ({"threshold": 2}, "threshold"),
        ({"mc_num": 0}, "mc_num"),
        ({"batch_size": "auto"}, "auto"),
        ({"think_mode": "hard"}, "hard"),
    ],
)
def test_bad_model_arguments_are_refused(given, named):
    with pytest.raises(InputError, match=named):
        ModelArguments.from_dict(given)
