"""Miniature benchmarks and the command line."""

import pytest
import torch
from click.testing import CliRunner
from miniature import write_miniatures

import vidlada
from vidlada.checkpoint.load import save_model
from vidlada.cli import main
from vidlada.evaluation.benchmarks import BENCHMARKS
from vidlada.training.config import Lora
from vidlada.training.models import add_lora


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A data root with a miniature of every benchmark, complete; not to be changed."""
    folder = tmp_path_factory.mktemp("data") / "root"
    write_miniatures(folder, list(BENCHMARKS.values()), clips=1, number=2)
    return folder


@pytest.fixture(scope="session")
def adapter(small_folder, tmp_path_factory):
    """A LoRA folder whose weights change every answer."""
    base = vidlada.load(small_folder, device="cpu")
    adapted = add_lora(base.model, Lora(rank=2, alpha=4), str(small_folder), seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("adapted") / "adapter"
    save_model(adapted, base.processor, folder)
    return folder


@pytest.fixture
def vidlada_eval():
    """The command in this process: exit code, standard output and error."""

    def call(*arguments):
        done = CliRunner().invoke(main, ["eval", *map(str, arguments)])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.stdout, done.stderr

    return call
