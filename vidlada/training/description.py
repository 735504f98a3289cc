"""The `model` of a run: what may be said of a new model, checked before torch is imported.

transformers' own configurations take any name for a wish of somebody's and keep it.
"""

from dataclasses import asdict
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.model.config import NewlinePosition, PoolMode, check_division
from vidlada.training.data.samples import STRICT
from vidlada.training.settings import build


@dataclass(frozen=True, config=STRICT)
class TextDescription:
    """Entries of `VidLaDATextConfig`; None leaves its default. The size of the vocabulary is the tokenizer's."""

    hidden_size: PositiveInt | None = None
    intermediate_size: PositiveInt | None = None
    num_hidden_layers: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    num_key_value_heads: PositiveInt | None = None
    max_position_embeddings: PositiveInt | None = None
    rms_norm_eps: PositiveFloat | None = None
    rope_theta: PositiveFloat | None = None
    initializer_range: NonNegativeFloat | None = None

    def __post_init__(self) -> None:
        check_division(self, "hidden_size", "num_attention_heads")
        check_division(self, "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True, config=STRICT)
class VisionDescription:
    """Entries of `SiglipVisionConfig`; None leaves its default. A pooling head would never be used."""

    hidden_size: PositiveInt | None = None
    intermediate_size: PositiveInt | None = None
    num_hidden_layers: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    image_size: PositiveInt | None = None
    patch_size: PositiveInt | None = None
    hidden_act: Literal["gelu_pytorch_tanh", "gelu", "quick_gelu", "silu", "relu"] | None = None
    layer_norm_eps: PositiveFloat | None = None
    vision_use_head: Literal[False] = False

    def __post_init__(self) -> None:
        check_division(self, "hidden_size", "num_attention_heads")
        if self.image_size is not None and self.patch_size is not None and self.image_size < self.patch_size:
            raise InputError(f"image_size {self.image_size} holds no patch of patch_size {self.patch_size}")


@dataclass(frozen=True, config=STRICT)
class ModelDescription:
    """Entries of `VidLaDAConfig`; None leaves its default. Tokens with a role are the tokenizer's."""

    text_config: TextDescription | None = None
    vision_config: VisionDescription | None = None
    spatial_pool_stride: PositiveInt | None = None
    spatial_pool_mode: PoolMode | None = None
    newline_position: NewlinePosition | None = None
    max_length: PositiveInt | None = None
    system_message: str | None = None
    generation: dict[str, Any] | None = None
    multi_turn: bool | None = None
    text_only: bool | None = None

    def __post_init__(self) -> None:
        GenerationSettings.from_dict(self.generation or {})


def described(values: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `VidLaDAConfig` from a run's `model`: the entries that were given.

    Raises:
        InputError: an entry is unknown or invalid, or two do not fit together.
    """
    return asdict(build(ModelDescription, values, "model"), dict_factory=without_none)


def without_none(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    """Entries that are given."""
    return {name: value for name, value in entries if value is not None}
