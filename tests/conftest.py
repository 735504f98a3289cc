"""What several rooms need: a small model with random weights that knows the words of the shapes world."""

import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("vidlada", deadline=None)  # no example is judged by its time
settings.load_profile("vidlada")

SMALL = {
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "rope_theta": 10000.0, "initializer_range": 0.2},
    "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "image_size": 36, "patch_size": 12, "vision_use_head": False},
    "system_message": "",
    "generation": {"gen_length": 32, "block_length": 8},
}  # fmt: skip

# Minutes each. They start first, so that no worker is left alone with one at the end (--dist loadfile).
LONGEST = [
    "evaluation/test_lmms_runs.py", "training/test_trainer.py", "training/test_parallel.py", "bench/test_decoding.py",
    "bench/test_serve.py", "bench/test_gpu.py", "training/test_adapt.py",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then the others with slow tests."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(item.path, len(LONGEST)), item.path not in slow))


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """A job in the background ignores Ctrl-C, and so would every process that tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded():
    """No test's random input depends on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


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
    """The small model, as `vidlada.load` loads it."""
    import vidlada

    return vidlada.load(small_folder)
