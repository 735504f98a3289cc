"""The whole of `ask` on a pretended GPU: frames, prompt, every cache × commit rule, guidance, stops, batches, reuse."""

from collections import Counter

import numpy as np
import pytest
import torch

import vidlada
from vidlada.bench.pretend import move, pretended_device
from vidlada.decoding.commit import RULES
from vidlada.decoding.policies import POLICIES

pytestmark = pytest.mark.slow

QUESTION = "what colour is the circle ?"
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 40, 44, 3), dtype=np.uint8)
COMMON = {"gen_length": 8, "block_length": 4, "noise": "counter"}
CACHES = {
    **{name: name for name in ("none", *POLICIES)},
    "prefix": "prefix:every=3",
    "interval": "interval:prompt=5,response=3",
    "dllm": "dllm:prompt=5,response=3",
    "mars": "mars:text=1,ratio=2,group=1",
    "chunks": "mars:window=1,fused=false,text=1,ratio=2,group=1,anchors=4",
    "scenes": "mars:window=1,fused=false,text=1,scene=0.1,per_head=true,anchors=4",
    "chunk_first": "mars:window=1,fused=false,chunk_first=true,text=1,anchors=0",
    "drift": "mars:drift=0.0001,probes=4,group=1",
}
FEW = ("none", "dual", "elastic", "mars", "chunks")  # of every kind, for what a cache has no part in
# Where the host may wait, and how often. For every step: the one copy of its proposals. For a question, nowhere.
STEP_WAITS = {"decoding/sampler.py cpu": 1}
# What a cache's method cannot do without: in which layer attention changed; where scenes begin, once a request.
OF_CACHES = {
    "elastic": {"decoding/policies/elastic.py tolist": 6},  # of eight steps, two of which begin a block
    "scenes": {"decoding/attention.py cpu": 1},
}


@pytest.fixture(scope="module")
def pretended(small_folder):
    """The small model on the pretended device, and what it is asked to do; and one in bfloat16."""
    models = [vidlada.load(small_folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    with pretended_device() as counts:
        for found in models:
            move(found.model, counts)
        yield *models, counts


def waits(counts):
    found = Counter()
    for (what, where), number in counts.waits.items():
        found[f"{where.partition(':')[0]} {what}"] += number
    return found


def check(counts, passes=1, **more):
    """No type is widened, and the host waits only where it may.

    Args:
        counts: of what was asked.
        passes: of the longest.
        more: further waits of all.
    """
    taken = counts.take()
    assert not taken.promotions
    found = waits(taken)
    allowed = Counter({where: number * passes for where, number in STEP_WAITS.items()})
    allowed.update(more)
    assert not found - allowed, found - allowed


def same(there, small, counts, media=FRAMES, allowed=(), **options):
    """Ask both; the answers must be the same."""
    options = {**COMMON, **options}
    counts.take()
    found = there.ask(media, QUESTION, **options)
    check(counts, found.statistics.steps, **dict(allowed))
    expected = small.ask(media, QUESTION, **options)
    assert found.token_ids == expected.token_ids
    assert found.statistics.layer_tokens == expected.statistics.layer_tokens
    assert found.statistics.refreshes == expected.statistics.refreshes


@pytest.mark.parametrize("name", FEW)
def test_every_commit_rule(pretended, small, name):
    there, _, counts = pretended
    for rule in RULES:
        same(there, small, counts, cache=CACHES[name], commit=rule, allowed=OF_CACHES.get(name, {}))


OF_SAMPLING = ({"temperature": 0.7}, {"temperature": 0.9, "top_p": 0.8}, {"remasking": "random"}, {"steps": 2})
OF_SEQUENCES = ({"cfg_scale": 1.0}, {"suffix": " now", "stop": ("last color",)}, {"visual_keep": 0.5})


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in CACHES for options in OF_SEQUENCES + (OF_SAMPLING if name in FEW else ())],
)
def test_every_setting(pretended, small, name, options):
    there, _, counts = pretended
    allowed = Counter({where: 2 * number for where, number in OF_CACHES.get(name, {}).items()})
    if "visual_keep" in options:  # which tokens are left is up to the tokens
        allowed += Counter({"decoding/merging.py cpu": 1})
    same(there, small, counts, cache=CACHES[name], allowed=allowed, **options)


@pytest.mark.parametrize("name", CACHES)
def test_a_batch(pretended, small, name):
    there, _, counts = pretended
    questions = [(FRAMES, QUESTION), (None, "is it red ?"), (FRAMES[:3], "describe the video .")]
    options = {**COMMON, "cache": CACHES[name]}
    if name in ("chunks", "scenes", "chunk_first"):
        questions = questions[::2]
    counts.take()
    found = there.ask_many(questions, **options)
    allowed = {where: len(questions) * number for where, number in OF_CACHES.get(name, {}).items()}
    check(counts, max(answer.statistics.steps for answer in found), **allowed)
    expected = small.ask_many(questions, **options)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]


@pytest.mark.parametrize("name", [name for name in CACHES if name != "none"])
def test_a_further_question_about_the_same_video(pretended, small, name):
    there, _, counts = pretended
    counts.take()
    texts = []
    for model in (there, small):
        chat = model.chat(FRAMES, **COMMON, cache=CACHES[name], reuse=1)
        texts.append([chat.ask(QUESTION).token_ids, chat.ask("is it red ?").token_ids])
        if model is there:
            allowed = {where: 2 * number for where, number in OF_CACHES.get(name, {}).items()}
            check(counts, 16, **allowed)
    assert texts[0] == texts[1]


def test_choices(pretended, small):
    there, _, counts = pretended
    counts.take()
    choices = ("red", "blue now", "green")
    found, expected = (model.ask(FRAMES, QUESTION, choices=choices, **COMMON) for model in (there, small))
    assert found.text == expected.text
    assert found.choices == pytest.approx(expected.choices)


@pytest.mark.parametrize("name", CACHES)
def test_bfloat16(pretended, name):
    """Types do not widen on the way; answers may differ from those of other kernels."""
    _, found, counts = pretended
    for options in ({}, {"cfg_scale": 1.0}, {"commit": "wino"}, {"temperature": 0.7}):
        counts.take()
        answer = found.ask(FRAMES, QUESTION, **COMMON, cache=CACHES[name], **options)
        allowed = {where: 2 * number for where, number in OF_CACHES.get(name, {}).items()}
        check(counts, answer.statistics.steps, **allowed)
