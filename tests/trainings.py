"""Runs of a minuscule model, for the tests of training."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vidlada.checkpoint.load import load_model
from vidlada.training.config import CollateSettings, Stage, TrainingConfig

MODEL = {
    "text_config": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56,
        "patch_size": 28, "vision_use_head": False,
    },
    "system_message": "",
    "max_length": 512,
}  # fmt: skip
PICTURES = {"kind": "shapes", "pictures": True, "frames_per_batch": 3, "questions": 2, "families": ["picture", "count"]}
CLIPS = {"kind": "shapes", "seconds": [2, 2], "frames_per_batch": 4, "questions": 2}
STEPS = 7
SIZE = 56  # of frames; below 50 pixels the clock of the shapes world does not fit


def run(output, **changes):
    """A run of two stages of three and four steps, with some of its settings changed."""
    stages = (
        Stage("pictures", 1e-2, PICTURES, 3, collate=CollateSettings(end_targets=1, end_slots=2)),
        Stage("clips", 1e-2, CLIPS, 4, final_learning_rate=1e-3, collate=CollateSettings(force_up_to=2)),
    )
    values = {"precision": "no", "warmup_steps": 2, "weight_decay": 0.01, "checkpoint_every": 2, "log_every": 1}
    values |= {"output": str(output), "stages": stages, "model": MODEL, "workers": 0, **changes}
    return TrainingConfig(**values)


def batch(source, step, size=SIZE):
    """All samples of one step."""
    return [source.load(item, size) for item in source.plan(step)]


def weights(folder):
    return load_model(Path(folder)).state_dict()


def assert_same(folder, expected):
    found = weights(folder)
    assert found.keys() == expected.keys()
    different = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert not different


def quietly(line):
    pass


def write_llama(folder: Path, unknown: str | None = None, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A Llama with random weights, tied embeddings and grouped heads, as SmolLM2 has; a tokenizer of single bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown).save_pretrained(folder)
    values = {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 5000.0,
        "max_position_embeddings": 512, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**values, **changes})).to(dtype).save_pretrained(folder)
    return folder
