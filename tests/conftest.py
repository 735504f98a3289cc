"""What several rooms need: a small model with random weights that knows the words of the shapes world."""

from pathlib import Path

import pytest

SMALL = {
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "rope_theta": 10000.0, "initializer_range": 0.2},
    "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "image_size": 36, "patch_size": 12, "vision_use_head": False},
    "system_message": "",
    "generation": {"gen_length": 32, "block_length": 8},
}  # fmt: skip


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory) -> Path:
    """A model folder as a training leaves it: 3 × 3 patches, 2 × 2 cells and 6 visual tokens a frame."""
    from vidlada.checkpoint.load import save_model
    from vidlada.training.models import new_model

    folder = tmp_path_factory.mktemp("small") / "model"
    model, processor = new_model(SMALL, seed=3)
    save_model(model, processor, folder)
    return folder


@pytest.fixture(scope="session")
def small(small_folder):
    """The small model, loaded through the front door."""
    import vidlada

    return vidlada.load(small_folder)
