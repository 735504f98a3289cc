"""Choosing between answers by likelihood, against a plain forward pass."""

import pytest
import torch

from vidlada.decoding.scoring import score_answers
from vidlada.errors import InputError

QUESTION = "which way does it move ?"
CHOICES = ["left", "red circle appears", "it stays still"]


def test_scores_are_those_of_a_plain_pass(small):
    model, processor = small.model, small.processor
    request = small.chat(None).request(QUESTION)
    answers = [processor.text_ids(choice) for choice in CHOICES]
    scores = score_answers(model, request.prompt, answers, slots=6)
    masks = model.language_model.embed_tokens(torch.full((6,), model.config.mask_token_id))
    with torch.no_grad():
        logits = model(inputs_embeds=torch.cat((request.prompt, masks))[None]).logits[0, len(request.prompt) :].clone()
    logits[:, list(model.config.suppressed_token_ids)] = -torch.inf
    for score, answer in zip(scores, answers, strict=True):
        ids = [*answer, model.config.stop_token_ids[0]]
        expected = sum(float(logits[slot].log_softmax(-1)[token]) for slot, token in enumerate(ids))
        assert float(score) == pytest.approx(expected, abs=1e-4)


def test_ask_answers_with_the_likeliest_choice(small):
    answer = small.ask(None, QUESTION, choices=CHOICES, gen_length=8)
    assert answer.text in CHOICES and answer.text == max(answer.choices, key=answer.choices.get)
    assert sum(answer.choices.values()) == pytest.approx(1)
    assert answer.statistics.forward_passes == 1
    turned = small.ask(None, QUESTION, choices=CHOICES[::-1], gen_length=8)
    assert turned.text == answer.text
    mixed = small.ask_many([(None, QUESTION), (None, QUESTION)], choices=[None, CHOICES], gen_length=8)
    assert mixed[1].text == answer.text and mixed[0].choices is None


@pytest.mark.parametrize("choices", [[], ["left", " "], ["left", "left"]])
def test_choices_that_cannot_be_told_apart_are_refused(small, choices):
    with pytest.raises(InputError, match="choices"):
        small.ask(None, QUESTION, choices=choices)


def test_an_answer_longer_than_the_model_is_refused(small):
    request = small.chat(None).request(QUESTION)
    with pytest.raises(InputError, match="more than the model"):
        score_answers(small.model, request.prompt, [[8] * small.model.config.max_length], slots=1)
