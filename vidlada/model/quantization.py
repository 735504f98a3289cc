"""Smaller weights: the language model's projections in 8 bits (torchao)."""

from typing import Literal, get_args

from torch import nn

from vidlada.errors import InputError
from vidlada.model.language_model import LanguageModel

Quantization = Literal["int8", "int8-dynamic"]


def quantize(language_model: LanguageModel, kind: Quantization) -> None:
    """Quantise the linear layers of a language model in place, one after another. Embeddings and head stay as they are.

    Args:
        language_model: loaded, in the type its other values keep.
        kind: `int8`: weights only, a scale for each output channel; `int8-dynamic`: activations too, each token with a
            scale of its own, so that the products themselves run in 8 bits.

    Raises:
        InputError: an unknown kind, or torchao is missing.
    """
    if kind not in get_args(Quantization):
        raise InputError(f"unknown quantisation {kind!r}; use {' or '.join(get_args(Quantization))}")
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise InputError("quantisation needs torchao; install vidlada[quantize]") from error
    config = Int8WeightOnlyConfig() if kind == "int8" else Int8DynamicActivationInt8WeightConfig()
    quantize_(language_model.layers, config, filter_fn=lambda module, name: isinstance(module, nn.Linear))
