"""Smaller weights: the language model's projections in 8 or 4 bits (torchao)."""

from typing import Any, Literal, get_args

import torch
from torch import nn

from vidlada.errors import InputError

# Weights only, widened for every product: int8 and float8 with a scale for each output channel, int4 for each group of
# inputs. With activations too, each token with a scale of its own, so that the products run in 8 bits: *-dynamic.
Quantization = Literal["int8", "int8-dynamic", "float8", "float8-dynamic", "int4"]
WEIGHT_BYTES: dict[str, float] = {"int8": 1, "int8-dynamic": 1, "float8": 1, "float8-dynamic": 1, "int4": 0.5}
GROUPS = (128, 64, 32)  # inputs that share an int4 scale, the preferred size first
FLOAT8_PRODUCTS = (8, 9)  # compute capability from which a GPU multiplies in float8
ALMOST_ZERO = 1e-20  # in place of the zeros of an output channel that has nothing else, whose scale would be 0 / 0


def check_quantization(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a quantisation that cannot be had, before any weights are loaded.

    Args:
        kind: see `Quantization`.
        device: of the model.
        dtype: of its other values.

    Raises:
        InputError: an unknown kind, one that the device cannot run, or torchao is missing.
    """
    names = get_args(Quantization)
    if kind not in names:
        raise InputError(f"unknown quantisation {kind!r}; use {', '.join(names[:-1])} or {names[-1]}")
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise InputError("quantisation needs torchao; install vidlada[quantize]") from error
    if kind == "float8-dynamic":
        if device.type != "cuda":
            raise InputError(f"float8-dynamic multiplies in float8, which {device.type} cannot; use float8 or int8")
        capability = torch.cuda.get_device_capability(device)
        if capability < FLOAT8_PRODUCTS:
            raise InputError(
                f"float8-dynamic needs a GPU of compute capability 8.9 (Ada, Hopper) or newer, not "
                f"{capability[0]}.{capability[1]}; use float8 or int8"
            )
    if kind == "int4" and device.type == "cuda" and dtype != torch.bfloat16:
        raise InputError(f"int4 products take bfloat16 on a GPU, not {dtype}; use dtype bfloat16")


def torchao_config(kind: Quantization, device: torch.device, group: int = GROUPS[0]) -> Any:
    """torchao's configuration of a quantisation.

    Args:
        kind: as checked by `check_quantization`.
        device: of the weights.
        group: inputs that share an int4 scale.
    """
    from torchao import quantization as ao

    if kind == "int8":
        return ao.Int8WeightOnlyConfig()
    if kind == "int8-dynamic":
        return ao.Int8DynamicActivationInt8WeightConfig()
    if kind == "float8":
        return ao.Float8WeightOnlyConfig()
    if kind == "float8-dynamic":
        return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    if device.type == "cuda":  # the packing that PyTorch's own kernel reads
        return ao.Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=group)


def quantize(module: nn.Module, kind: Quantization) -> None:
    """Quantise the linear layers of a module in place, one after another.

    Args:
        module: a language model's layers, or one of them, loaded, in the type its other values keep. Embeddings and the
            head stay as they are.
        kind: see `Quantization`.

    Raises:
        InputError: see `check_quantization`; or no group of int4 fits the width of a layer.
    """
    from torchao.quantization import quantize_

    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    weight = linears[0].weight
    check_quantization(kind, weight.device, weight.dtype)
    widths = {linear.in_features for linear in linears}
    group = next((size for size in GROUPS if all(width % size == 0 for width in widths)), None)
    if kind == "int4" and group is None:
        raise InputError(f"int4 needs widths that are multiples of {GROUPS[-1]}, not {', '.join(map(str, widths))}")
    if kind.startswith("float8"):  # the others give such an output a scale above 0
        least = max(ALMOST_ZERO, torch.finfo(weight.dtype).smallest_normal / 2**10)
        for linear in linears:
            linear.weight.data.masked_fill_(linear.weight.data.abs().amax(1, keepdim=True) == 0, least)
    quantize_(
        module,
        torchao_config(kind, weight.device, group or GROUPS[0]),
        filter_fn=lambda part, name: isinstance(part, nn.Linear),
    )
