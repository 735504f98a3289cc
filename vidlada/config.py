"""Configuration of the model and of decoding: one dataclass for every group of settings, validated on construction."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, SiglipVisionConfig
from transformers.configuration_utils import SubConfigSpec

from vidlada.errors import InputError

NewlinePosition = Literal["grid", "frame", "one_token", "no_token"]
PoolMode = Literal["bilinear", "average", "max"]
Remasking = Literal["low_confidence", "random"]


@strict
class VidLaDATextConfig(PreTrainedConfig):
    """The language model: a Llama-shaped transformer without a causal mask. Defaults are LLaDA-8B's."""

    model_type: ClassVar[str] = "vidlada_text"
    base_config_key: ClassVar[str] = "text_config"

    vocab_size: int = 126464
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    max_position_embeddings: int = 16384
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@strict
class VidLaDAConfig(PreTrainedConfig):
    """The whole model: language model, vision tower, how visual tokens are laid out, and the tokens with a role.

    Args:
        text_config: the language model.
        vision_config: the SigLIP tower **as kept**: the published tower has its last encoder layer removed,
            so the features used are the second-to-last layer's.
        spatial_pool_stride, spatial_pool_mode: pooling of each frame's patch grid after the projector.
        newline_position: where the learned newline vector stands: after each grid row (published), after each
            frame, once at the end, or nowhere.
        video_token_id: stand-in for one visual token in `input_ids`; not a token of the vocabulary.
        mask_token_id: the token that stands for "not decided yet".
        suppressed_token_ids: never proposed by the sampler (bos, eos, header marks in the published model).
        stop_token_ids: end the answer (end of turn in the published model).
        generation: defaults of `GenerationSettings` for this checkpoint.
        system_message: the system turn the model was trained with.
        multi_turn: the model was trained on conversations; if not, every question is asked by itself.
        text_only: there is no visual half (LLaDA, the text-only ancestor).
    """

    model_type: ClassVar[str] = "vidlada"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(config_class=VidLaDATextConfig, model_type="vidlada_text"),
        "vision_config": SubConfigSpec(
            config_class=SiglipVisionConfig,
            model_type="siglip_vision_model",
            # SigLIP2-so400m-patch14-384 without its last layer and pooling head
            init_kwargs={
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 26,
                "num_attention_heads": 16,
                "image_size": 384,
                "patch_size": 14,
                "vision_use_head": False,
            },
        ),
    }

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    spatial_pool_stride: int = 2
    spatial_pool_mode: PoolMode = "bilinear"
    newline_position: NewlinePosition = "grid"
    video_token_id: int = -200
    mask_token_id: int = 126336
    bos_token_id: int | None = 126080
    eos_token_id: int | None = 126081
    pad_token_id: int | None = 126081
    suppressed_token_ids: list[int] | tuple[int, ...] = (126081, 126080, 126346, 126347)
    stop_token_ids: list[int] | tuple[int, ...] = (126348,)
    max_length: int = 32768
    system_message: str = (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the "
        "user provides, and assist the user with a variety of tasks using natural language."
    )
    generation: dict[str, Any] | None = None
    multi_turn: bool = True
    text_only: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        GenerationSettings.from_dict(self.generation or {})

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a frame (27 in the published model)."""
        return int(self.vision_config.image_size) // int(self.vision_config.patch_size)  # type: ignore[union-attr]

    @property
    def pooled_per_side(self) -> int:
        """Grid cells along one side of a frame after pooling (14 in the published model)."""
        if self.spatial_pool_mode == "bilinear":
            return -(-self.patches_per_side // self.spatial_pool_stride)
        return self.patches_per_side // self.spatial_pool_stride

    def tokens_per_frame(self) -> int:
        """Visual tokens of one frame, row or frame newlines included (210 in the published model)."""
        side = self.pooled_per_side
        return side * side + {"grid": side, "frame": 1}.get(self.newline_position, 0)

    def visual_tokens(self, frames: int) -> int:
        """Visual tokens of a video of `frames` frames."""
        return frames * self.tokens_per_frame() + (self.newline_position == "one_token")


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is decoded (LLaDA sampling).

    Args:
        gen_length: answer slots, in tokens.
        block_length: slots decoded together, blocks left to right; divides `gen_length`.
        steps: denoising steps for the whole answer; None is one token a step. A multiple of the number of blocks.
        temperature: of the Gumbel noise; 0 is greedy.
        cfg_scale: classifier-free guidance; 0 is off (one pass a step instead of two).
        remasking: how proposals are ranked: by their probability, or at random.
        threshold: commit every proposal at least this confident, at least one a step (Fast-dLLM); None: by `steps`.
        factor: commit the largest n with (n + 1)(1 - confidence_n) < factor (Fast-dLLM); None: by `steps`.
        stop: strings that end the answer, besides the checkpoint's end-of-turn token.
        suffix: fixed text after the answer slots, visible from the first step and returned with the answer.
        seed: of every random choice of this answer.
        cache: what is reused between steps: `none`, or a policy of `vidlada.decoding.policies` by name, with settings
            after a colon.
        reuse: let further questions about a video start from the frames' keys and values of the question before, which
            were computed beside another question; needs a cache.
    """

    gen_length: int = 128
    block_length: int = 32
    steps: int | None = None
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: Remasking = "low_confidence"
    threshold: float | None = None
    factor: float | None = None
    stop: tuple[str, ...] = field(default=())
    suffix: str = ""
    seed: int = 0
    cache: str = "none"
    reuse: bool = False

    def __post_init__(self) -> None:
        for name in ("gen_length", "block_length", "steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.gen_length % self.block_length:
            raise InputError(
                f"block_length {self.block_length} does not divide gen_length {self.gen_length}; "
                f"choose a block_length that does"
            )
        if self.steps is not None and self.steps % self.num_blocks:
            raise InputError(
                f"steps {self.steps} is not a multiple of the {self.num_blocks} blocks "
                f"(gen_length {self.gen_length} / block_length {self.block_length})"
            )
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be at least 0, not {self.temperature!r}")
        if not 0 <= self.cfg_scale < float("inf"):
            raise InputError(f"cfg_scale must be at least 0, not {self.cfg_scale!r}")
        if self.remasking not in ("low_confidence", "random"):
            raise InputError(f"remasking must be low_confidence or random, not {self.remasking!r}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise InputError(f"threshold must be above 0 and at most 1, not {self.threshold!r}")
        if self.factor is not None and not self.factor > 0:
            raise InputError(f"factor must be above 0, not {self.factor!r}")
        if self.threshold is not None and self.factor is not None:
            raise InputError("threshold and factor exclude each other; give one of them")
        if self.steps is not None and (self.threshold is not None or self.factor is not None):
            raise InputError("steps is fixed in advance; it cannot be combined with threshold or factor")
        if self.remasking == "random" and (self.threshold is not None or self.factor is not None):
            raise InputError("threshold and factor compare probabilities; they need remasking low_confidence")
        if self.reuse and self.cache == "none":
            raise InputError("reuse takes over what a cache has kept; choose a cache, e.g. mars")
        object.__setattr__(self, "stop", tuple(self.stop))
        if any(not word for word in self.stop):
            raise InputError("a stop string must not be empty")

    @property
    def num_blocks(self) -> int:
        """Blocks the answer is decoded in."""
        return self.gen_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        """Steps each block may take; one token a step unless `steps` says otherwise."""
        return self.block_length if self.steps is None else self.steps // self.num_blocks

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GenerationSettings":
        """Settings from a mapping; an unknown name is an `InputError` that lists the known ones."""
        return cls().updated(**values)

    def updated(self, **changes: Any) -> "GenerationSettings":
        """A copy with some settings changed; None leaves a setting as it is.

        A `gen_length` that the default `block_length` does not divide takes the largest block that does, unless
        `block_length` is given too. `threshold`, `factor` and `steps` replace each other.
        """
        known = {entry.name for entry in fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise InputError(f"unknown generation setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        given = {name: value for name, value in changes.items() if value is not None}
        paces = {"threshold", "factor", "steps"}
        if paces & set(given):
            given = dict.fromkeys(paces) | given
        gen_length = given.get("gen_length")
        if "block_length" not in given and isinstance(gen_length, int) and gen_length > 0:
            given["block_length"] = max(n for n in range(1, self.block_length + 1) if gen_length % n == 0)
        return replace(self, **given)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON."""
        return asdict(self)
