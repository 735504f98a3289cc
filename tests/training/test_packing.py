"""Samples packed into one row: the loss and gradients of a row for each."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from trainings import CLIPS, MODEL, SIZE, batch, quietly, run, weights

from vidlada.errors import InputError
from vidlada.model.masks import PackedMask
from vidlada.training.config import CollateSettings, Stage
from vidlada.training.data.collate import Collator
from vidlada.training.data.samples import Sample
from vidlada.training.data.shapes import ShapesSource
from vidlada.training.models import new_model
from vidlada.training.objective import Masking, diffusion_loss, draw_masking, draw_times
from vidlada.training.trainer import train

SETTINGS = CollateSettings(end_targets=2, end_slots=5, force_up_to=2, weigh_every=4)


@pytest.fixture(scope="module")
def samples():
    """A video of three frames, text alone, an image with a conversation, two videos."""
    generator = np.random.default_rng(0)

    def video(*shape):
        return generator.integers(0, 255, (*shape, SIZE, SIZE, 3), dtype=np.uint8)

    return [
        Sample([video(3)], [("what colour is the circle ?", "red")]),
        Sample([], [("where ?", "left"), ("and the square ?", "right of the circle")]),
        Sample([video()], [("what ?", "a circle"), ("where is it ?", "above the square and left of it")]),
        Sample([video(1), video(2)], [("which is first ?", "the circle")]),
    ]


@pytest.fixture(scope="module")
def model_and_processor():
    return new_model({**MODEL, "text_config": {**MODEL["text_config"], "initializer_range": 0.3}}, seed=1)


def loss_of(model, tensors, masked, probability):
    masking = Masking(masked, probability)
    hidden = tensors["input_ids"].masked_fill(masked, model.config.mask_token_id)
    output = model(
        input_ids=hidden, pixel_values=tensors["pixel_values"], media_shapes=tensors["media_shapes"],
        attention_mask=tensors["attention_mask"], position_ids=tensors["position_ids"], logits_to_keep=masked,
    )  # fmt: skip
    return diffusion_loss(
        output.logits, tensors["labels"], tensors["sample_index"], masking, None, tensors.get("sample_weight")
    )


@pytest.mark.parametrize("multiple", [1, 64])
def test_loss_and_gradients_are_those_of_separate_rows(samples, model_and_processor, multiple):
    """With the same positions hidden: tolerance 1e-5 for sums in another order."""
    model, processor = model_and_processor
    found = []
    settings = replace(SETTINGS, pad_to_multiple_of=multiple)
    apart = Collator(processor, settings)(samples, np.random.default_rng(0))
    packed = Collator(processor, replace(settings, packing=True))(samples, np.random.default_rng(0))
    assert len(apart["input_ids"]) == len(samples) and len(packed["input_ids"]) == 1
    for name in ("input_ids", "labels", "position_ids", "sample_index"):
        rows = [row[valid] for row, valid in zip(apart[name], apart["sample_index"] >= 0, strict=True)]
        assert torch.cat(rows).tolist() == packed[name][packed["sample_index"] >= 0].tolist()
    for name in ("force", "sample_weight"):
        assert torch.equal(apart[name], packed[name])
    generator = torch.Generator().manual_seed(0)
    masking = draw_masking(
        apart["labels"] >= 0, apart["sample_index"], draw_times(len(samples), generator), generator, apart["force"]
    )
    masked = torch.zeros_like(packed["labels"], dtype=torch.bool)
    masked[packed["sample_index"] >= 0] = masking.masked[apart["sample_index"] >= 0]
    for tensors, hidden in ((apart, masking.masked), (packed, masked)):
        model.zero_grad()
        loss = loss_of(model, tensors, hidden, masking.probability)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    (first, of_rows), (second, of_pack) = found
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)
    assert of_rows.keys() == of_pack.keys()
    for name, gradient in of_rows.items():
        torch.testing.assert_close(of_pack[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_packed_mask_is_block_diagonal():
    mask = PackedMask((2, 3, 1))
    expected = torch.block_diag(*(torch.ones(size, size) for size in mask.sizes)).bool()
    assert torch.equal(mask.dense()[0, 0], expected)
    states = [torch.randn(1, 2, 6, 4) for _ in range(3)]
    dense = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=mask.dense())
    torch.testing.assert_close(mask.attend(*states), dense)


def test_a_stand_in_changes_nothing(samples, model_and_processor):
    """Text alone in one of several processes, whose tower must run all the same."""
    model, processor = model_and_processor
    settings = replace(SETTINGS, packing=True)
    text = [samples[1], samples[1]]
    with_stand_in = Collator(processor, settings, SIZE)(text, np.random.default_rng(0))
    plain = Collator(processor, settings)(text, np.random.default_rng(0))
    plain |= {"pixel_values": None, "media_shapes": None}
    losses = []
    for tensors in (with_stand_in, plain):
        masked = tensors["labels"] >= 0
        losses.append(loss_of(model, tensors, masked, torch.ones(2)).detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", ["conversation_mask", "pad_targets"])
def test_what_needs_rows_of_its_own_is_refused(other):
    with pytest.raises(InputError, match=f"packing and {other} exclude each other"):
        CollateSettings(packing=True, **{other: True})


def test_questions_that_share_a_video_are_refused(model_and_processor):
    source = ShapesSource(**{name: value for name, value in CLIPS.items() if name != "kind"})
    with pytest.raises(InputError, match="packing.*share a row already"):
        Collator(model_and_processor[1], CollateSettings(packing=True))(batch(source, 0), np.random.default_rng(0))
    with pytest.raises(InputError, match="stage a: packing needs a row for every sample"):
        train(run("out", stages=(Stage("a", 1e-3, CLIPS, 1, collate=CollateSettings(packing=True)),)))


@pytest.mark.parametrize("ends", [0, 7])
def test_rows_keep_to_their_budget(samples, model_and_processor, ends):
    """In order, nothing lost; with what may follow an answer, and the frame that stands in."""
    _, processor = model_and_processor
    settings = CollateSettings(packing=True, end_slots=ends)
    many = [samples[number % 4] for number in range(11)]
    alone = [Collator(processor, CollateSettings())([sample], np.random.default_rng(0)) for sample in samples]
    longest = max(batch["input_ids"].shape[1] for batch in alone)
    for stand_in in (None, SIZE):
        unseen = len(processor.media_frame_index(1)) if stand_in else 0
        for budget in (longest + ends + unseen, 3 * longest):
            collator = Collator(processor, replace(settings, tokens_per_row=budget), stand_in)
            rows = collator.rows(many, np.random.default_rng(0))
            assert len(rows) > 1 and max(batch["input_ids"].shape[1] for _, batch in rows) <= budget
            counts = [len(batch["force"]) for _, batch in rows]
            assert [first for first, _ in rows] == np.cumsum([0, *counts[:-1]]).tolist() and sum(counts) == 11
        tight = Collator(processor, replace(settings, tokens_per_row=longest + ends + unseen - 1), stand_in)
        with pytest.raises(InputError, match="more than the .* of a packed row"):
            for sample in many:
                tight.check(tight.cut(sample))


def test_budgets_of_rows_are_checked():
    for values, message in (
        ({}, "set packing: true"),
        ({"packing": True, "end_slots": 64}, "leave no room"),
        ({"packing": True, "pad_to_multiple_of": 48}, "no multiple of pad_to_multiple_of"),
    ):
        with pytest.raises(InputError, match=message):
            CollateSettings(tokens_per_row=64, **values)
    stage = Stage("a", 1e-3, CLIPS, 1, collate=CollateSettings(packing=True, tokens_per_row=64))
    with pytest.raises(InputError, match="tokens_per_row.*fsdp"):
        run("out", stages=(stage,), parallel="fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_a_packed_run_comes_to_the_weights_of_an_unpacked_one(tmp_path, one_thread, objective):
    """Every answer is hidden whole, so that nothing is drawn but the data; two passes a step, or several rows."""
    data = {**CLIPS, "seconds": [2, 4], "questions": 1, "frames_per_batch": 16}
    found = []
    for packing in ({}, {"packing": True}, {"packing": True, "tokens_per_row": 64}):
        collate = CollateSettings(force_up_to=99, **packing)
        stage = Stage("a", 1e-2, data, 4, collate=collate)
        passes = None if "tokens_per_row" in packing else 1
        settings = run(tmp_path / str(len(found)), stages=(stage,), objective=objective, per_device_batch=passes)
        found.append(weights(train(settings, report=quietly)))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-4)
