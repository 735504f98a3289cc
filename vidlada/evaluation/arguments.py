"""What lmms-eval's `--model_args` and `--gen_kwargs` mean here. Everything is used or refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from vidlada.decoding.choices import check_choices
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.model.quantization import Quantization
from vidlada.settings import settings_of
from vidlada.video import Sampling

ThinkMode = Literal["no_think", "think"]
DECODING = (
    "speed",
    "cache",
    "commit",
    "threshold",
    "factor",
    "reuse",
    "visual_keep",
    "visual_prune",
    "kv_dtype",
)  # generation settings that model arguments may give for all tasks
# how many tokens a step commits; one replaces another
PACES = ("steps", "gen_steps", "threshold", "factor", "commit", "speed")
RENAMED = {"torch_dtype": "dtype", "peft": "adapter"}
GENERATION_NAMES = {name: name for name in settings_of(GenerationSettings) if name != "stop"} | {
    "gen_steps": "steps", "cfg": "cfg_scale",
}  # as the published evaluation calls them  # fmt: skip
# Of autoregressive decoding, with the values that mean "off"; tasks give these.
WITHOUT_COUNTERPART: dict[str, tuple[Any, ...]] = {
    "top_k": (None, 0), "num_beams": (None, 1), "num_return_sequences": (None, 1), "n": (None, 1),
    "repetition_penalty": (None, 1),
}  # fmt: skip
SAY_GREEDY = {"top_p": 0, "top_k": 1}  # the same as temperature 0, which some tasks give with it


@dataclass(frozen=True)
class ModelArguments:
    """`--model_args`, under the names of the published harness where it has one.

    Args:
        pretrained: `tiny`, or a folder: a checkpoint, or a LoRA adapter whose base is at hand.
        adapter: folder of a LoRA adapter for `pretrained`.
        max_frames_num: most frames of a video.
        video_fps: candidate frames a second.
        force_sample: always take `max_frames_num` frames.
        add_time_instruction: tell the model when its frames were taken.
        think_mode: `no_think` or `think` is appended to every question, after a slash; in answers with a thought only
            what follows it counts.
        system_prompt: instead of the checkpoint's system message.
        dtype, device, quantization, compiled: as `vidlada.load` takes them.
        speed, cache, commit, threshold, factor, reuse, visual_keep, visual_prune, kv_dtype: of `GenerationSettings`;
            `--gen_kwargs` come after. The settings of a cache or rule are separated by `;`, because lmms-eval splits at
            commas: `cache=mars:text=8;ratio=2`.
        mc_num: Monte Carlo samples of a likelihood.
        batch_size_ppl: of these, how many run together.
        mc_seed: of their masks.
        is_check_greedy: also find out whether greedy decoding gives the continuation (one pass a token).
        batch_size: questions answered together.
        conv_template, model_name: accepted from published scripts; the checkpoint's own template is always used.
    """

    pretrained: str = "tiny"
    adapter: str | None = None
    max_frames_num: int = Sampling().most
    video_fps: float = Sampling.fps
    force_sample: bool = Sampling.force_sample
    add_time_instruction: bool = False
    think_mode: ThinkMode | None = None
    system_prompt: str | None = None
    dtype: str = "auto"
    device: str | None = None
    quantization: Quantization | None = None
    compiled: bool = False
    speed: str | None = None
    cache: str | None = None
    commit: str | None = None
    threshold: float | None = None
    factor: float | None = None
    reuse: int | None = None
    visual_keep: float | None = None
    visual_prune: str | None = None
    kv_dtype: str | None = None
    mc_num: int = 128
    batch_size_ppl: int = 32
    mc_seed: int = 0
    is_check_greedy: bool = True
    batch_size: int = 1
    conv_template: str = "llava_llada"
    model_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("mc_num", "batch_size_ppl", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name in ("force_sample", "add_time_instruction", "compiled", "is_check_greedy"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.conv_template != "llava_llada":
            raise InputError(f"conv_template {self.conv_template!r} is unknown; the checkpoint's own template is used")
        check_think_mode(self.think_mode)
        self.sampling  # noqa: B018 - validates
        check_choices(GenerationSettings().replace(**self.decoding))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelArguments":
        """From what lmms-eval parsed; `InputError` names what is unknown."""
        values = {RENAMED.get(name, name): value for name, value in values.items()}
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"unknown model argument {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if "batch_size" in values:
            try:
                values["batch_size"] = int(values["batch_size"])
            except ValueError as error:
                raise InputError(f"batch_size must be a number, not {values['batch_size']!r}") from error
        for name in ("pretrained", "adapter", "system_prompt"):  # lmms-eval turns whatever looks like a number into one
            if values.get(name) is not None:
                values[name] = str(values[name])
        return cls(**values)

    @property
    def sampling(self) -> Sampling:
        """Which frames of a video are taken."""
        return Sampling(float(self.video_fps), self.max_frames_num, self.force_sample)

    @property
    def decoding(self) -> dict[str, Any]:
        """Generation settings given for all tasks."""
        given = {name: getattr(self, name) for name in DECODING if getattr(self, name) is not None}
        if self.think_mode is not None:
            given["think"] = self.think_mode == "think"
        return given | {name: str(given[name]).replace(";", ",") for name in ("cache", "commit") if name in given}


def check_think_mode(value: Any) -> None:
    """`InputError` unless it is one the model was trained with, or None."""
    if value not in (None, "no_think", "think"):
        raise InputError(f"think_mode must be no_think or think, not {value!r}")


def generation_settings(
    defaults: GenerationSettings, arguments: dict[str, Any], decoding: Mapping[str, Any] | None = None
) -> GenerationSettings:
    """Settings of one request.

    Args:
        defaults: the checkpoint's, with those of the model arguments.
        arguments: the task's own `generation_kwargs` with the user's `--gen_kwargs` over them. Tasks are written for
            autoregressive models: `max_new_tokens` sets `gen_length` unless that is given too, `until` are stop
            strings, `do_sample` has to agree with `temperature`; `top_p`, `num_beams` and the like must be off, or
            say "greedy" where decoding is.
        decoding: of the model arguments; `defaults` have them already. Each may be replaced by name only.

    Returns:
        The settings; `think_mode` is their `think`.

    Raises:
        InputError: an argument is unknown, asks for what masked diffusion has no counterpart of, or would take the
            effect of a model argument away.
    """
    left = dict(arguments)
    think_mode = left.pop("think_mode", None)
    check_think_mode(think_mode)
    changes: dict[str, Any] = {} if think_mode is None else {"think": think_mode == "think"}
    for name, ours in GENERATION_NAMES.items():
        if left.get(name) is not None:
            if changes.get(ours, left[name]) != left[name]:
                raise InputError(f"{name} {left[name]!r} contradicts {ours} {changes[ours]!r}")
            changes[ours] = left[name]
        left.pop(name, None)
    for name in {"cache", "commit"} & changes.keys():
        changes[name] = str(changes[name]).replace(";", ",")
    for name in ("max_new_tokens", "max_gen_toks"):
        limit = left.pop(name, None)
        if limit is not None:
            changes.setdefault("gen_length", limit)
    until = left.pop("until", None) or ()
    changes["stop"] = tuple(word for word in ((until,) if isinstance(until, str) else until) if word)
    changes["temperature"] = _temperature(changes.get("temperature"), left.pop("do_sample", None))
    greedy = (defaults.temperature if changes["temperature"] is None else changes["temperature"]) == 0
    if greedy and changes.get("top_p") == SAY_GREEDY["top_p"]:
        del changes["top_p"]
    for name, off in WITHOUT_COUNTERPART.items():
        value = left.pop(name, None)
        if value not in off and not (greedy and value == SAY_GREEDY.get(name)):
            raise InputError(f"{name} {value!r} has no counterpart in masked diffusion; leave it out")
    if left:
        known = sorted({*GENERATION_NAMES, *WITHOUT_COUNTERPART, "max_new_tokens", "until", "do_sample", "think_mode"})
        raise InputError(f"unknown generation argument {', '.join(sorted(left))}; known: {', '.join(known)}")
    for name in ("temperature", "top_p", "cfg_scale", "threshold", "factor"):
        if isinstance(changes.get(name), int):
            changes[name] = float(changes[name])
    settings = defaults.replace(**{name: value for name, value in changes.items() if name != "stop"})
    check_choices(settings)  # an unknown policy or rule stops the run, not every sample
    for name, value in (decoding or {}).items():
        if name not in changes and getattr(settings, name) != value:
            raise InputError(f"{name} {value!r} has no effect beside {_pace(arguments)}; leave one of them out")
    return replace(settings, stop=changes["stop"])


def _pace(arguments: Mapping[str, Any]) -> str:
    """What the arguments say about how many tokens a step commits."""
    return ", ".join(f"{name} {arguments[name]!r}" for name in PACES if arguments.get(name) is not None)


def _temperature(temperature: float | None, do_sample: bool | None) -> float | None:
    """What both mean together; `InputError` where they contradict each other."""
    if do_sample and temperature is None:
        return 1.0
    if do_sample is not None and temperature is not None and bool(do_sample) != (temperature > 0):
        raise InputError(f"do_sample {do_sample} contradicts temperature {temperature}; change one of them")
    return temperature
