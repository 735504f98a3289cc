"""The loss of a whole training step under each option, against plain loops over tokens of samples taken one by one."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from trainings import MODEL, SIZE, quietly, run

from vidlada.training.config import CollateSettings, Stage
from vidlada.training.parallel import make_accelerator
from vidlada.training.stages import prepare_run
from vidlada.training.trainer import Run

SEED, STEP = 7, 1
CONVERSATIONS = [
    {"image": "0.png", "questions": ["<image>\nwhich colour ?"], "answers": ["red"]},
    {"questions": ["how many ?"], "answers": ["three red stars and a blue circle"], "process": "one and two are three"},
    {
        "image": ["0.png", "1.png"],
        "questions": ["<image> or <image> ?", "and where ?"],
        "answers": ["the first", "left"],
    },
    {
        "image": "1.png",
        "questions": ["<image>\nwhat moves ?"],
        "answers": ["a star moves up and then left"],
        "process": "up",
    },
]
CONTROL = ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

OPTIONS = {
    "as it comes": {},
    "times not stratified": {"stratified": False},
    "complementary masks": {"complementary": True},
    "short answers fully hidden": {"collate": {"force_up_to": 2}},
    "short answers fully hidden, complementary": {"collate": {"force_up_to": 2}, "complementary": True},
    "control tokens as targets": {"collate": {"control_targets": True}},
    "padding as targets": {"collate": {"pad_targets": True}},
    "turns see no later ones": {"collate": {"conversation_mask": True}},
    "thinking": {"data": {"think": True}},
    "the causal twin": {"objective": "autoregressive"},
    "short answers fully hidden, with the published quirks": {
        "collate": {"force_up_to": 2, "control_targets": True, "pad_targets": True}
    },
    "the published quirks": {"collate": {"control_targets": True, "pad_targets": True, "conversation_mask": True}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    entries = []
    for number, conversation in enumerate(CONVERSATIONS):
        turns = [
            {"from": who, "value": text}
            for pair in zip(conversation["questions"], conversation["answers"], strict=True)
            for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
        more = {name: conversation[name] for name in ("image", "process") if name in conversation}
        entries.append({"id": str(number), "conversations": turns, **more})
    (folder / "data.json").write_text(json.dumps(entries))
    return folder / "data.json"


def plain_tokens(processor, conversation, collate, think):
    """Token ids of a conversation, which are targets, their turns, and how many are answer: read off its text."""
    token = processor.tokenizer.convert_tokens_to_ids
    text = "<|startoftext|>"
    for number, (question, answer) in enumerate(zip(conversation["questions"], conversation["answers"], strict=True)):
        if think and number == 0:
            process = conversation.get("process")
            question = f"{question}/no_think" if process is None else f"{question}/think"
            answer = answer if process is None else f"<think>{process}</think>\n{answer}"
        if question.count("<image>") == 1:  # several stand where they are
            question = f"<image>\n{question.replace('<image>', '').strip()}"
        for role, turn in (("user", question), ("assistant", answer)):
            text += f"<|start_header_id|>{role}<|end_header_id|>\n\n{turn}<|eot_id|>"
    ids, targets, turns, turn = [], [], [], -1
    for number, piece in enumerate(text.split("<image>")):
        if number:
            ids += [processor.video_token_id] * processor.tokens_per_frame
        ids += processor.tokenizer(piece, add_special_tokens=False)["input_ids"]
    answering, answer_length = False, 0
    for number, one in enumerate(ids):
        turn += ids[number : number + 2] == [token("<|start_header_id|>"), token("user")]
        targets.append(answering or (collate.control_targets and one in map(token, CONTROL)))
        turns.append(max(turn, 0))
        answer_length += answering
        if one == token("<|eot_id|>"):
            answering = False
        header = [token("assistant"), token("<|end_header_id|>"), token("\n\n")]
        if ids[max(number - 2, 0) : number + 1] == header:
            answering = True
            if collate.control_targets:  # the whole block of the assistant, its header too
                targets[-3:] = [True] * 3
    return ids, targets, turns, answer_length


def plain_loss(run, pictures, collate, think):
    """The mean over samples of what each loses by itself."""
    config, token = run.config, run.processor.tokenizer.convert_tokens_to_ids
    samples = [
        (*plain_tokens(run.processor, CONVERSATIONS[item.media], collate, think), CONVERSATIONS[item.media])
        for item in run.sources[0].plan(STEP)
    ]
    longest = max(len(ids) for ids, *_ in samples)
    if collate.pad_targets:
        for ids, targets, turns, *_ in samples:
            more = longest - len(ids)
            ids += [token("<|endoftext|>")] * more
            targets += [True] * more
            turns += turns[-1:] * more
    generator = torch.Generator().manual_seed(SEED * 1000 * 10**9 + STEP)
    times = torch.rand(len(samples), generator=generator)
    if config.stratified:
        times = (torch.randperm(len(samples), generator=generator) + times) / len(samples)
    draws = torch.rand(len(samples), longest, generator=generator)
    total = 0.0
    for number, (ids, targets, turns, answer_length, conversation) in enumerate(samples):
        probability = (1 - 1e-3) * float(times[number]) + 1e-3
        forced = answer_length <= collate.force_up_to
        places = [i for i in range(len(ids)) if targets[i]]
        hidden = [i for i in places if forced or draws[number, i] < probability]
        masks = [(hidden, 1.0 if forced else probability)]
        if config.complementary and forced:
            masks.append((hidden, 1.0))
        elif config.complementary:
            masks.append(([i for i in places if i not in hidden], 1 - probability))
        named = conversation.get("image", [])
        own = [pictures[int(name[0])] for name in ([named] if isinstance(named, str) else named)]

        def log_probabilities(ids, turns, own):
            allowed = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool)
            for query in range(len(ids)):
                for key in range(len(ids)):
                    later_turn = collate.conversation_mask and turns[key] > turns[query]
                    later_token = config.objective == "autoregressive" and key > query
                    allowed[0, 0, query, key] = not later_turn and not later_token
            seen = {"pixel_values": torch.cat(own), "media_shapes": [1] * len(own)} if own else {}
            return run.model(input_ids=torch.tensor([ids]), attention_mask=allowed, **seen).logits[0].log_softmax(-1)

        if config.objective == "autoregressive":
            predicted = log_probabilities(ids, turns, own)
            total -= sum(float(predicted[i - 1, ids[i]]) for i in places) / len(places)
            continue
        for at, share in masks:
            shown = [token("<|mdm_mask|>") if i in at else one for i, one in enumerate(ids)]
            predicted = log_probabilities(shown, turns, own)
            total -= sum(float(predicted[i, ids[i]]) for i in at) / share / len(places) / len(masks)
    return total / len(samples)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_loss_of_a_step(data, tmp_path, option):
    changes = {name: value for name, value in OPTIONS[option].items() if name not in ("collate", "data")}
    collate = CollateSettings(**OPTIONS[option].get("collate", {}))
    more = OPTIONS[option].get("data", {})
    source = {"kind": "llava", "json_path": str(data), "batch_size": len(CONVERSATIONS), **more}
    stages = (Stage("a", 1e-3, source, 2, collate=collate),)
    config = run(tmp_path / "run", stages=stages, seed=SEED, model=MODEL, **changes)
    one = Run(prepare_run(config), make_accelerator(config), quietly)
    generator = torch.Generator().manual_seed(0)
    for parameter in one.model.parameters():  # new models begin as the identity, where nothing sees anything
        parameter.data.normal_(0, 0.3, generator=generator)
    pictures = [
        one.processor.pixel_values(np.asarray(Image.open(data.with_name(f"{number}.png")))[None]) for number in range(2)
    ]
    one.model.eval().requires_grad_(False)
    (batch,) = one.batches.of(one.sources[0], collate, 0, range(STEP, STEP + 1))
    found = float(one.loss(batch, STEP))
    expected = plain_loss(one, pictures, collate, bool(more))
    assert found == pytest.approx(expected, rel=1e-5)
