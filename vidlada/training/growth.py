"""A deeper model that computes what a shallower one did, to be trained on."""

import copy
from collections.abc import Sequence

from torch import nn

from vidlada.errors import InputError
from vidlada.model.language_model import Layer
from vidlada.model.video_model import VidLaDAForMaskedDiffusion


def insert_layers(model: VidLaDAForMaskedDiffusion, after: Sequence[int]) -> None:
    """Follow layers of the language model by copies whose outputs are zero: the residual stream passes them unchanged.

    Args:
        model: changed in place.
        after: numbers of the layers to copy, as they are now.

    Raises:
        InputError: there is no such layer.
    """
    layers = model.language_model.layers
    beyond = [number for number in after if number >= len(layers)]
    if beyond:
        raise InputError(f"new_layers: {beyond}, but the model's layers are 0 to {len(layers) - 1}")
    deeper = nn.ModuleList()
    for number, layer in enumerate(layers):
        deeper.append(layer)
        for _ in range(list(after).count(number)):
            new = copy.deepcopy(layer)
            assert isinstance(new, Layer)
            nn.init.zeros_(new.self_attn.o_proj.weight)
            nn.init.zeros_(new.mlp.down_proj.weight)
            deeper.append(new)
    model.language_model.layers = deeper
    model.config.text.num_hidden_layers = len(deeper)
