"""Configuration of the model, validated on construction."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, SiglipVisionConfig
from transformers.configuration_utils import SubConfigSpec

from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.tiling import ImageShape, MediaShape, MergeType, Tiling

NewlinePosition = Literal["grid", "frame", "one_token", "no_token"]
PoolMode = Literal["bilinear", "average", "max"]


def check_division(settings: Any, whole: str, parts: str) -> None:
    """Refuse a size that is given with a number of parts that does not divide it."""
    size, count = getattr(settings, whole), getattr(settings, parts)
    if size is not None and count is not None and size % count:
        raise InputError(f"{whole} {size} is not divisible by {parts} {count}")


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
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        check_division(self, "hidden_size", "num_attention_heads")
        check_division(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise InputError(f"heads of width {self.head_dim}: rotary positions need an even width")

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
        image_aspect_ratio, image_grid_pinpoints, image_merge_type: how images are taken; see
            `vidlada.tiling.Tiling`. Published checkpoints say `anyres_max_4`; models of our own see an image as a
            video of one frame.
        video_token_id: stand-in for one visual token in `input_ids`; not a token of the vocabulary.
        mask_token_id: the token that stands for "not decided yet".
        suppressed_token_ids: never proposed by the sampler (bos, eos, header marks in the published model).
        stop_token_ids: end the answer (end of turn in the published model).
        generation: defaults of `GenerationSettings` for this checkpoint.
        system_message: the system turn the model was trained with.
        multi_turn: the model was trained on conversations; if not, every question is asked by itself.
        text_only: there is no visual half (LLaDA, the text-only ancestor).
        source: of a model converted from another layout: that `layout`, and the `config` its config.json held.
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
    image_aspect_ratio: str = "frame"
    image_grid_pinpoints: list[list[int]] | None = None
    image_merge_type: MergeType = "spatial_unpad"
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
    source: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        GenerationSettings.from_dict(self.generation or {})
        if not self.text_only:
            self.tiling  # noqa: B018 - validates

    @property
    def text(self) -> VidLaDATextConfig:
        """The language model's configuration."""
        assert isinstance(self.text_config, VidLaDATextConfig)
        return self.text_config

    @property
    def vision(self) -> SiglipVisionConfig:
        """The vision tower's configuration, as kept."""
        assert isinstance(self.vision_config, SiglipVisionConfig)
        return self.vision_config

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a frame (27 in the published model)."""
        return int(self.vision.image_size) // int(self.vision.patch_size)

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

    @property
    def tiling(self) -> Tiling:
        """How images are taken."""
        pinpoints = self.image_grid_pinpoints
        return Tiling(
            self.image_aspect_ratio,
            int(self.vision.image_size),
            self.patches_per_side,
            None if pinpoints is None else tuple(tuple(pinpoint) for pinpoint in pinpoints),  # type: ignore[misc]
            self.image_merge_type,
        )

    def visual_tokens(self, shape: MediaShape) -> int:
        """Visual tokens of an image, or of a video of so many frames."""
        if isinstance(shape, ImageShape):
            return self.tiling.tokens(shape)
        return shape * self.tokens_per_frame() + (self.newline_position == "one_token")

    def newlines(self, shape: MediaShape) -> list[bool]:
        """Which of the visual tokens of an image, or of a video of so many frames, are newline vectors."""
        if isinstance(shape, ImageShape):
            return self.tiling.newlines(shape)
        row = [False] * self.pooled_per_side + [True] * (self.newline_position == "grid")
        frame = row * self.pooled_per_side + [True] * (self.newline_position == "frame")
        return frame * shape + [True] * (self.newline_position == "one_token")
