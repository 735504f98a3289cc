"""Samples to tensors: what is a target, what sees what, and where samples come from."""

import json

import numpy as np
import pytest
import torch
from media import number_of, write_video
from trainings import MODEL, SIZE, batch

from vidlada.errors import InputError
from vidlada.messages import END_OF_TURN, MASK
from vidlada.training.config import CollateSettings
from vidlada.training.data.collate import Collator, Part, StepDataset
from vidlada.training.data.llava import LlavaSource
from vidlada.training.data.mixture import read_llava
from vidlada.training.data.samples import Sample
from vidlada.training.data.shapes import ShapesSource
from vidlada.training.models import new_model
from vidlada.training.objective import IGNORED
from vidlada.video import Sampling

ARGUMENTS = {
    **MODEL,
    "text_config": {**MODEL["text_config"], "initializer_range": 0.5},
    "vision_config": {**MODEL["vision_config"], "image_size": 24, "patch_size": 12},
}
SHORT, LONG = ("Where is the red ball?", "left"), ("What happens?", "the red ball moves left and stops.")


@pytest.fixture(scope="module")
def new():
    model, processor = new_model(ARGUMENTS, 0)
    return model.eval().requires_grad_(False), processor


def video(frames, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, 24, 24, 3), dtype=np.uint8)


def collate(new, samples, seed=0, **settings):
    return Collator(new[1], CollateSettings(**settings))(samples, np.random.default_rng(seed))


def logits(new, batch, **changes):
    """Logits of every position with all targets hidden."""
    model, _ = new
    names = ("position_ids", "attention_mask", "pixel_values", "media_shapes")
    hidden = batch["input_ids"].masked_fill(batch["labels"] != IGNORED, model.config.mask_token_id)
    return model(input_ids=hidden, **{**{name: batch.get(name) for name in names}, **changes}).logits


def separate_samples_mask(owner):
    """All pairs of a row: every sample sees the shared part (owner -1) and itself, nobody sees padding (-2)."""
    seen = (owner[:, None, :] == -1) | (owner[:, None, :] == owner[:, :, None])
    return (seen & (owner != -2)[:, None, :])[:, None]


def alone(new, sample, exchange):
    """What a packed exchange must reproduce: its own row, in which the shared part does not see the question."""
    batch = collate(new, [Sample(sample.videos, [exchange], separate=True)])
    mask = separate_samples_mask(batch["sample_index"])
    return logits(new, batch, attention_mask=mask)[batch["labels"] != IGNORED]


def test_a_packed_sample_is_the_sample_alone(new):
    samples = [
        Sample([video(3)], [SHORT, LONG, ("Is there a cube?", "no")], separate=True),
        Sample([], [LONG, SHORT], separate=True),
        Sample([video(2, 1)], [SHORT], separate=True),
    ]
    batch = collate(new, samples)
    packed = logits(new, batch)
    unmasked = logits(new, batch, attention_mask=batch["sample_index"] != -2)
    number = 0
    for sample in samples:
        for exchange in sample.exchanges:
            place = (batch["labels"] != IGNORED) & (batch["sample_index"] == number)
            expected = alone(new, sample, exchange)
            torch.testing.assert_close(packed[place], expected, rtol=0, atol=1e-4)
            assert (unmasked[place] - expected).abs().max() > 1e-2  # the mask is what makes them equal
            number += 1
    assert number == len(batch["force"]) == 6


def test_a_packed_answer_sees_its_video(new):
    first, second = (collate(new, [Sample([video(2, seed)], [SHORT, LONG], separate=True)], seed=0) for seed in (1, 2))
    place = first["labels"] != IGNORED
    assert (logits(new, first)[place] - logits(new, second)[place]).abs().amax(-1).min() > 1e-3


def test_a_batch_with_padding_trains_every_part_with_finite_gradients():
    model, processor = new_model(ARGUMENTS, 0)
    samples = [Sample([video(2)], [SHORT, LONG], separate=True), Sample([], [SHORT], separate=True)]
    batch = collate((model, processor), samples)
    logits((model, processor), batch)[batch["labels"] != IGNORED].sum().backward()
    unused = "vision.tower.post_layernorm"  # the published model reads features before it
    gradients = {name: p.grad for name, p in model.named_parameters() if not name.startswith(unused)}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


def test_targets_are_the_answers(new):
    _, processor = new
    batch = collate(new, [Sample([video(2)], [LONG, SHORT])])
    eot = processor.token_id(END_OF_TURN)
    answers = [*processor.text_ids(LONG[1]), eot, *processor.text_ids(SHORT[1]), eot]
    labels = batch["labels"]
    assert labels[labels != IGNORED].tolist() == answers
    assert torch.equal(labels[labels != IGNORED], batch["input_ids"][labels != IGNORED])
    assert batch["attention_mask"] is None


def test_control_targets_add_the_control_tokens_and_the_answers_header(new):
    _, processor = new
    plain, quirk = (collate(new, [Sample([], [SHORT])], control_targets=on) for on in (False, True))
    added = quirk["input_ids"][(quirk["labels"] != IGNORED) & (plain["labels"] == IGNORED)].tolist()
    controls = ["<|startoftext|>", *["<|start_header_id|>", "<|end_header_id|>"] * 2, END_OF_TURN]
    header = [*processor.text_ids("assistant"), *processor.text_ids("\n\n")]
    assert sorted(added) == sorted([*map(processor.token_id, controls), *header])


def test_control_targets_of_packed_samples(new):
    samples = [Sample([video(2)], [SHORT, LONG], separate=True)]
    plain, quirk = (collate(new, samples, control_targets=on) for on in (False, True))
    in_plain, in_quirk = plain["labels"] != IGNORED, quirk["labels"] != IGNORED
    assert bool(in_quirk[in_plain].all()) and in_quirk.sum() > in_plain.sum() > 0
    assert torch.equal(quirk["labels"][in_quirk], quirk["input_ids"][in_quirk])


def test_packed_samples_without_exchanges(new):
    """Sixty pictures of which some do not support a question about a colour."""
    samples = batch(ShapesSource(frames_per_batch=60, pictures=True, families=("colour",), questions=1), 0)
    exchanges = sum(len(sample.exchanges) for sample in samples)
    assert 0 < exchanges < 60
    labels = collate(new, samples)["labels"]
    assert int((labels == new[1].token_id(END_OF_TURN)).sum()) == exchanges


def test_end_targets_and_slots_follow_the_answer(new):
    _, processor = new
    eot, mask = processor.token_id(END_OF_TURN), processor.token_id(MASK)
    seen = set()
    for seed in range(200):
        batch = collate(new, [Sample([], [SHORT])], seed, end_targets=2, end_slots=3)
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        start = labels.index(processor.text_ids(SHORT[1])[0]) + len(processor.text_ids(SHORT[1])) + 1
        targets, slots = ids[start:].count(eot), ids[start:].count(mask)
        assert ids[start:] == [eot] * targets + [mask] * slots
        assert labels[start - 1 :] == [eot] * (targets + 1) + [IGNORED] * slots
        seen.add((targets, slots))
    assert seen == {(targets, slots) for targets in range(3) for slots in range(4)}


def test_short_answers_are_forced(new):
    samples = [Sample([video(2)], [LONG, SHORT], separate=True), Sample([], [SHORT], separate=True)]
    assert collate(new, samples, force_up_to=2)["force"].tolist() == [False, True, True]
    assert collate(new, samples, force_up_to=1)["force"].tolist() == [False, False, False]


def test_the_conversation_mask_hides_later_turns(new):
    first_turn = len(collate(new, [Sample([video(2)], [SHORT])])["input_ids"][0])
    samples = [Sample([video(2)], [SHORT, second]) for second in (LONG, ("Is there a cube?", "no"))]
    for on in (True, False):
        one, other = (logits(new, collate(new, [sample], conversation_mask=on))[0, :first_turn] for sample in samples)
        assert ((one - other).abs().max() < 1e-4) == on


def write_llava(folder, entries, name="data.json"):
    text = json.dumps(entries) if name.endswith(".json") else "".join(json.dumps(entry) + "\n" for entry in entries)
    path = folder / name
    path.write_text(text)
    return path


def entry(answer, **more):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
    return {"id": answer, "conversations": turns, **more}


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_reads_videos_and_sees_every_sample_once_a_pass(tmp_path, name):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "clip.mp4", frames=50)
    entries = [entry(str(number), **({} if number == 4 else {"video": "clip.mp4"})) for number in range(5)]
    path = write_llava(tmp_path, entries, name)
    source = LlavaSource(path, video_folder=tmp_path / "videos", batch_size=2, sampling=Sampling(fps=5))
    samples = [sample for step in range(5) for sample in batch(source, step, 96)]
    passes = [[sample.exchanges[0][1] for sample in part] for part in (samples[:5], samples[5:])]
    assert sorted(passes[0]) == sorted(passes[1]) == ["0", "1", "2", "3", "4"]
    assert passes[0] != passes[1]
    for sample in samples:
        assert [question for question, _ in sample.exchanges] == ["<image>\nWhat is it?"]
        if sample.exchanges[0][1] == "4":
            assert not sample.videos
        else:
            assert sample.videos[0].shape == (10, 96, 96, 3)
            assert [number_of(frame) for frame in sample.videos[0]] == list(range(0, 50, 5))


def test_llava_paths_start_at_the_json(tmp_path):
    write_video(tmp_path / "clip.mp4", frames=25)
    path = write_llava(tmp_path, [entry("a", video="clip.mp4")])
    assert len(batch(LlavaSource(path, batch_size=1), 0)[0].videos[0]) == 1


def test_llava_conversations_of_several_turns(tmp_path):
    turns = [entry(answer)["conversations"] for answer in ("one", "two")]
    path = write_llava(tmp_path, [{"conversations": turns[0] + turns[1]}])
    (sample,) = batch(LlavaSource(path, batch_size=1), 0)
    assert sample.exchanges == [("<image>\nWhat is it?", "one"), ("<image>\nWhat is it?", "two")]
    assert not sample.separate


MALFORMED = [
    ("data.json", "[{"),
    ("data.jsonl", "{}{}\n"),
    ("data.json", "{}"),
    ("data.json", "[]"),
    ("data.json", '[{"id": 1}]'),
    ("data.json", '[{"conversations": []}]'),
    ("data.json", '["text"]'),
    ("data.json", '[{"conversations": [{"from": "human", "value": "q"}]}]'),
    ("data.json", '[{"conversations": [{"from": "gpt", "value": "q"}, {"from": "human", "value": "q"}]}]'),
    ("data.json", b"\xff\xfe\x00"),
]
CRASHING = ['[{"conversations": ["q", "a"]}]', '[{"conversations": [{"from": "human"}, {"from": "gpt"}]}]',
            '[{"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": 2}]}]',
            '[{"video": 3, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]',
            ]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), MALFORMED)
def test_malformed_llava_files_are_named(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=name):
        read_llava(path)


@pytest.mark.parametrize("text", CRASHING)
def test_malformed_llava_entries_are_named(tmp_path, text):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(InputError, match="data.json"):
        batch(LlavaSource(path, batch_size=1), 0)


def test_jsonl_lines_end_at_newlines_alone(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(entry("one\u2028line"), ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(read_llava(path)) == 1


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match="nothing.json"):
        read_llava(tmp_path / "nothing.json")
    path = write_llava(tmp_path, [entry("a", video="gone.mp4")])
    with pytest.raises(InputError, match="gone.mp4"):
        batch(LlavaSource(path, batch_size=1), 0)


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        for name, value in first.items()
    )


def test_steps_are_the_same_in_any_order(new):
    def dataset(seed):
        source = ShapesSource(seed=seed, frames_per_batch=4, questions=2, seconds=(2, 2))
        return StepDataset(source, Collator(new[1], CollateSettings(end_targets=2, end_slots=5)), seed)

    forward, backward = dataset(1), dataset(1)
    batches = [forward[Part(step)] for step in range(3)]
    assert all(same(batches[step], backward[Part(step)]) for step in (2, 1, 0))
    assert not same(batches[0], batches[1])
    assert not same(batches[0], dataset(2)[Part(0)])


def test_shapes_batches_hold_what_was_asked_for():
    source = ShapesSource(frames_per_batch=7, seconds=(2, 3), questions=3)
    lengths = set()
    for step in range(12):
        samples = batch(source, step)
        (seconds,) = {len(sample.videos[0]) for sample in samples}
        assert len(samples) == 7 // seconds
        assert all(len(sample.exchanges) == 3 and sample.separate for sample in samples)
        lengths.add(seconds)
    assert lengths == {2, 3}
    pictures = batch(ShapesSource(frames_per_batch=7, pictures=True, families=("picture", "count")), 0)
    assert [sample.videos[0].shape for sample in pictures] == [(1, SIZE, SIZE, 3)] * 7
    blind = batch(ShapesSource(frames_per_batch=4, text_only_share=1.0, single_share=1.0), 0)
    assert all(not sample.videos and len(sample.exchanges) == 1 for sample in blind)
