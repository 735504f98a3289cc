"""KV caches that keep keys and values in 8 bits, with a scale for every token and head.

They take about half of the memory. They are no faster: attention needs the wide type, so that a layer's keys and values
are widened whenever its queries look.
"""

from typing import Any

import torch
from torch import Tensor

from vidlada.decoding.kv_cache import KVCache, key_value_bytes
from vidlada.model.config import VidLaDATextConfig

SCALE_BYTES = 4  # float32


class Int8KVCache(KVCache):
    """Keys and values as whole numbers from -127 to 127, and their scales.

    Attributes:
        scales: for each layer, (2 × key/value heads, tokens, 1) float32.
    """

    largest = 127.0

    def __init__(self, *arguments: Any, **options: Any):
        self.scales: list[Tensor] = []
        super().__init__(*arguments, **{**options, "spare": 0})  # `read_with` widens all there is

    def allocate(self, like: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """See `KVCache`; a scale beside every row."""
        self.wide = like.dtype
        self.scales.append(torch.ones(*shape[:-1], 1, device=device))
        # bytes, because few kernels know float8
        return torch.zeros(shape, dtype=torch.int8, device=device)

    def write(self, layer: int, positions: Tensor, states: Tensor) -> None:
        """See `KVCache`."""
        states = states.float()
        scales = states.abs().amax(-1, keepdim=True).clamp(min=1e-12) / self.largest
        self.layers[layer].index_copy_(1, positions, self.narrow(states / scales))
        self.scales[layer].index_copy_(1, positions, scales)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `KVCache`; in the wide type."""
        keys, values = self.widen(self.layers[layer], self.scales[layer]).split(self.heads)
        return keys, values

    def read_with(self, layer: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVCache`; in the wide type."""
        wide = self.widen(self.layers[layer], self.scales[layer])
        keys, values = torch.cat((wide, states), dim=1).split(self.heads)
        return keys, values

    def select(self, layer: int, positions: Tensor) -> Tensor:
        """See `KVCache`; in the wide type."""
        return self.widen(self.layers[layer].index_select(1, positions), self.scales[layer].index_select(1, positions))

    def keep(self, places: Tensor) -> None:
        """See `KVCache`."""
        super().keep(places)
        for number, scales in enumerate(self.scales):
            self.scales[number] = scales.index_select(1, places.to(scales.device))

    def nbytes(self) -> int:
        """See `KVCache`."""
        return super().nbytes() + sum(scales.nbytes for scales in self.scales)

    def narrow(self, states: Tensor) -> Tensor:
        """To bytes, from values within ±`largest`."""
        return states.round().to(torch.int8)

    def widen(self, stored: Tensor, scales: Tensor) -> Tensor:
        """From bytes."""
        return torch.mul(stored, scales, out=torch.empty_like(stored, dtype=self.wide))


class Float8KVCache(Int8KVCache):
    """Keys and values as float8 (e4m3), and their scales."""

    largest = 448.0

    def narrow(self, states: Tensor) -> Tensor:
        """See `Int8KVCache`."""
        return states.clamp(-self.largest, self.largest).to(torch.float8_e4m3fn).view(torch.int8)

    def widen(self, stored: Tensor, scales: Tensor) -> Tensor:
        """See `Int8KVCache`."""
        return stored.view(torch.float8_e4m3fn).to(self.wide).mul_(scales)


KV_CACHES = {"auto": KVCache, "int8": Int8KVCache, "float8": Float8KVCache}


def kv_cache_of(kv_dtype: str) -> type[KVCache]:
    """The KV cache that keeps its values in a type of `GenerationSettings.kv_dtype`."""
    return KV_CACHES[kv_dtype]


def stored_bytes(config: VidLaDATextConfig, tokens: int, value_bytes: int, kv_dtype: str) -> int:
    """Memory of the keys and values of a sequence, their scales, and one layer of them widened.

    Args:
        config: of the language model.
        tokens: of the sequence.
        value_bytes: bytes a value in the type the request runs in.
        kv_dtype: as in `GenerationSettings`.
    """
    if kv_dtype == "auto":
        return key_value_bytes(config, tokens, value_bytes)
    narrow = key_value_bytes(config, tokens, 1)
    scales = narrow // config.head_dim * SCALE_BYTES
    return narrow + scales + narrow // config.num_hidden_layers * value_bytes
