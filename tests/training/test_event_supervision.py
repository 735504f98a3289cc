"""Middle layers learn what happens in frames, and what a question asks about."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from trainings import MODEL, quietly, run

from vidlada.errors import InputError
from vidlada.shapes.captions import event_words
from vidlada.shapes.world import COLOURS, SHAPES
from vidlada.training.config import CollateSettings, EventSupervision, Stage
from vidlada.training.data.collate import Collator
from vidlada.training.data.event_labels import CLASSES, KINDS, frame_events, question_events
from vidlada.training.data.shapes import ShapesSource
from vidlada.training.event_supervision import EventLoss
from vidlada.training.models import new_model
from vidlada.training.objective import IGNORED

DATA = {"kind": "shapes", "seconds": [5, 8], "frames_per_batch": 24, "questions": 4, "choice_share": 0.0,
        "families": ["at", "quiet", "order"], "shifted_share": 0.5, "rates": [1, 2, 0.5]}  # fmt: skip
SETTINGS = EventSupervision(frame_layers=(0,), question_layers=(0,), neighbour_layers=(0,))


def words_of(labels):
    """An event in words, from its labels."""
    if labels.kind == 0:
        return "nothing"
    what = KINDS[labels.kind] if labels.new_colour == IGNORED else f"turns {list(COLOURS)[labels.new_colour]}"
    return f"{list(COLOURS)[labels.colour]} {SHAPES[labels.shape]} {what}"


def items(step):
    return ShapesSource(**{name: value for name, value in DATA.items() if name != "kind"}).plan(step)


@pytest.mark.parametrize("step", range(6))
def test_labels_say_what_happens(step):
    for item in items(step):
        clip, times = item.media
        found = {time: words_of(labels) for time, labels in zip(times, frame_events(clip, times), strict=True)}
        expected = dict.fromkeys(times, "nothing")
        for event in reversed(clip.events):
            expected[event.second] = event_words(clip, event)
        assert found == expected
        for event in question_events(clip, item.exchanges):
            question, answer = item.exchanges[event.exchange]
            assert words_of(event.labels) == answer
            assert event.word in question.split()


def test_tokens_are_those_of_frames_and_of_the_moment_asked_about():
    model, processor = new_model(MODEL, 0)
    source = ShapesSource(**{name: value for name, value in DATA.items() if name != "kind"})
    seconds = marks = 0
    for step in range(4):
        samples = [source.load(item, processor.image_size) for item in source.plan(step)]
        batch = Collator(processor, CollateSettings(), events=True)(samples, np.random.default_rng(0))
        ids, owner = batch["input_ids"], batch["sample_index"]
        row, place, *_ = batch["frame_events"].T
        assert (ids[row, place] == processor.video_token_id).all()
        frames = [len(video) for sample in samples for video in sample.videos]
        tokens = len(processor.media_frame_index(1))
        starts = [(ids[row] == processor.video_token_id).nonzero()[0].item() for row in range(len(samples))]
        assert place.tolist() == [
            start + n * tokens for start, number in zip(starts, frames, strict=True) for n in range(number)
        ]
        kinds = batch["frame_events"][:, 2:]
        for name, past in (("previous_events", True), ("next_events", False)):
            neighbours = {(row, place): labels for row, place, *labels in batch[name].tolist()}
            for n, (row, place, *_) in enumerate(batch["frame_events"].tolist()):
                same_clip = (batch["frame_events"][:, 0] == row) & (kinds[:, 0] > 0)
                (found,) = (same_clip[:n] if past else same_clip[n + 1 :]).nonzero(as_tuple=True)
                others = kinds[found if past else found + n + 1].tolist()
                nearest = others[-1 if past else 0] if others else [0, IGNORED, IGNORED, IGNORED]
                assert neighbours[row, place] == nearest
        questions = [question for sample in samples for question, _ in sample.exchanges]
        for row, place, *_ in batch["question_events"].tolist():
            question = questions[owner[row, place]]
            word = processor.tokenizer.decode([ids[row, place]])
            assert word == (re.search(r"second (\d+)", question) or [None, "?"])[1]
            seconds, marks = seconds + (word != "?"), marks + (word == "?")
    assert seconds > 5 and marks > 2


def cross_entropy(reader, states, events, quiet):
    """Label by label; of tokens at which nothing happens `quiet` times as much."""
    losses, weights = 0.0, 0.0
    for row, place, *labels in events.tolist():
        weight = quiet if labels[0] == 0 else 1.0
        weights += weight
        for label, read in zip(labels, reader(states[row, place][None]), strict=True):
            if label != IGNORED:
                losses += weight * F.cross_entropy(read, torch.tensor([label])).item()
    return losses / weights


def test_the_loss_is_cross_entropy_over_labels():
    model, _ = new_model(MODEL, 0)
    language_model = model.language_model
    settings = EventSupervision((0,), (0,), (0,), frame_weight=0.3, question_weight=0.5, neighbour_weight=0.2)
    loss = EventLoss(settings, language_model)
    states = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    events = torch.tensor([[0, 3, 2, 1, 4, IGNORED], [1, 5, 0, IGNORED, IGNORED, IGNORED], [1, 8, 3, 0, 0, 7]])
    weights = {"frame": (0.3, 0.25), "question": (0.5, 0.5), "previous": (0.1, 0.5), "next": (0.1, 0.5)}
    for kind, (weight, quiet) in weights.items():
        language_model(states)
        expected = weight * cross_entropy(loss.readers[f"{kind}0"], loss.states[0], events, quiet)
        torch.testing.assert_close(loss({f"{kind}_events": events}).item(), expected, rtol=1e-4, atol=1e-5)
    assert [part.out_features for part in loss.readers["frame0"].maps] == list(CLASSES)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_and_leaves_no_readers(tmp_path):
    def settings(name, steps):
        stage = Stage("events", 5e-3, DATA, steps, final_learning_rate=5e-3)
        return run(tmp_path / name, stages=(stage,), event_supervision=SETTINGS, checkpoint_every=3)

    from vidlada.training.trainer import train

    whole = train(settings("whole", 6), report=quietly)
    train(settings("parts", 3), report=quietly)
    resumed = train(settings("parts", 6), resume=True, report=quietly)
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert not [name for name in found if "reader" in name]
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_supervised_is_refused(tmp_path):
    with pytest.raises(InputError, match="layers \\[1\\], but it takes 0 to 0"):
        EventLoss(EventSupervision(frame_layers=(1,)), new_model(MODEL, 0)[0].language_model)
    with pytest.raises(InputError, match="one process"):
        run(tmp_path, event_supervision=SETTINGS, parallel="ddp")
