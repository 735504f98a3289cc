"""A deeper model starts where the shallower one stood."""

import pytest
import torch
from trainings import MODEL

from vidlada.errors import InputError
from vidlada.training.growth import insert_layers
from vidlada.training.models import new_model


def test_new_layers_change_nothing_until_they_are_trained():
    model, _ = new_model(MODEL, 0)
    ids = torch.randint(7, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids).logits
    insert_layers(model, [0, 1, 1])
    after = model(input_ids=ids).logits
    torch.testing.assert_close(after, before)
    assert len(model.language_model.layers) == model.config.text_config.num_hidden_layers == 5
    after.square().sum().backward()
    new = [model.language_model.layers[number] for number in (1, 3, 4)]
    assert all(layer.self_attn.o_proj.weight.grad.abs().sum() > 0 for layer in new)
    assert all(layer.mlp.down_proj.weight.grad.abs().sum() > 0 for layer in new)


def test_a_layer_that_is_not_there_cannot_be_followed():
    model, _ = new_model(MODEL, 0)
    with pytest.raises(InputError, match="layers are 0 to 1"):
        insert_layers(model, [2])
