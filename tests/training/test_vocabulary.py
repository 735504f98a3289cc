"""Tokens of think mode: added where a stage asks for them, with rows of their own."""

import json

import pytest
import torch

from vidlada.errors import InputError
from vidlada.messages import THINK_TOKENS
from vidlada.training.config import load_config
from vidlada.training.models import initial_model, initial_processor
from vidlada.training.vocabulary import add_think_tokens

RUN = """
output: {output}
init_from: {folder}
precision: "no"
workers: 0
warmup_steps: 0
tracker: none
stages:
  - {{name: thought, steps: 2, learning_rate: 1.0e-3, think_tokens: {think},
     data: {{kind: llava, json_path: {data}, batch_size: 2, think: true}}, collate: {{control_targets: true}}}}
"""


@pytest.fixture
def run_of(small_folder, tmp_path):
    talk = [{"from": "human", "value": "is it red ?"}, {"from": "gpt", "value": "yes"}]
    entries = [{"conversations": talk, "process": "the circle is red"}, {"conversations": talk}]
    (tmp_path / "d.json").write_text(json.dumps(entries))

    def write(think="true", more=""):
        text = RUN.format(output=tmp_path / "run", folder=small_folder, data=tmp_path / "d.json", think=think)
        (tmp_path / "run.yaml").write_text(text + more)
        return load_config(tmp_path / "run.yaml")

    return write


def test_rows_are_added_and_the_others_stay(run_of, small):
    model, processor = initial_model(run_of())
    rows = small.model.language_model.config.vocab_size
    assert set(processor.think_ids) == set(THINK_TOKENS)
    assert model.config.text_config.vocab_size == len(processor.tokenizer) == rows + 4
    for new, old in ((model.language_model.embed_tokens, small.model.language_model.embed_tokens),
                     (model.lm_head, small.model.lm_head)):  # fmt: skip
        assert new.weight.shape[0] == rows + 4
        assert torch.equal(new.weight[:rows], old.weight)
        assert torch.allclose(new.weight[rows:], old.weight.mean(0).expand(4, -1), atol=1e-6)
    assert initial_processor(run_of()).think_ids == processor.think_ids
    assert add_think_tokens(model, processor).think_ids == processor.think_ids  # a second time adds nothing
    assert model.lm_head.weight.shape[0] == rows + 4


def test_nothing_is_added_unasked(run_of, small):
    model, processor = initial_model(run_of("false"))
    assert processor.think_ids == {}
    assert model.config.text_config.vocab_size == small.model.language_model.config.vocab_size


def test_adapters_cannot_learn_new_tokens(run_of):
    with pytest.raises(InputError, match="think_tokens: adapters leave the embeddings frozen"):
        run_of(more="lora: {rank: 2}\n")


@pytest.mark.slow
def test_a_trained_thinker_loads_and_thinks(run_of):
    import vidlada
    from vidlada.training.trainer import train

    folder = train(run_of())
    loaded = vidlada.load(folder)
    assert set(loaded.processor.think_ids) == set(THINK_TOKENS)
    answer = loaded.ask(None, "is it red ?", think=True, gen_length=8, think_length=8)
    assert answer.statistics.tokens >= 2
