"""A pretended GPU: nothing mixes devices or types, the host waits once a step, and no kernels come back."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from vidlada.bench.count import count_figures, count_table, count_work, typical_step
from vidlada.bench.pretend import DEVICE, DeviceTensor, MixedDevicesError, move, pretended_device
from vidlada.bench.sizes import random_model, random_request
from vidlada.cli import main
from vidlada.decoding.sampler import denoise
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings

pytestmark = pytest.mark.slow

TEXT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.3}  # fmt: skip
CACHES = (
    "none", "full", "prefix:every=3", "dual", "frozen", "interval:prompt=5,response=3", "sparse", "mars:text=1,ratio=2",
    "mars:window=1,fused=false,text=1,ratio=2,anchors=4",
    "mars:window=1,fused=false,chunk_first=true,text=1,ratio=2,anchors=0",
    "mars:drift=0.0001,probes=4,group=2",
)  # fmt: skip
PACES = (
    {},
    {"threshold": 0.2},
    {"cfg_scale": 1.0},
    {"temperature": 0.7, "noise": "counter"},
    {"remasking": "random", "steps": 4, "noise": "counter"},
)
# Where the host may wait: the proposals of a step, and a policy that refreshes by what it measures.
ALLOWED = {("cpu", "decoding/sampler.py"): 1, ("tolist", "decoding/cache.py"): 2}


def models(dtype):
    """The same model on the CPU, twice."""
    found = []
    for _ in range(2):
        model = random_model(TEXT, "cpu", dtype)
        model.config.suppressed_token_ids = (1, 2)
        model.language_model.pack()
        found.append(model)
    return found


def requests_of(model, dtype):
    for number, cache in enumerate(CACHES):
        settings = GenerationSettings(gen_length=8, block_length=4, cache=cache).replace(**PACES[number % len(PACES)])
        request = random_request(model, 5, 4, settings)
        yield replace(request, prompt=request.prompt.to(dtype), stop_sequences=((90,), (91, 3)), suffix_ids=(5, 6))


def final(model, requests):
    last = {}
    for number, state in denoise(model, requests):
        last[number] = state
    return last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_every_policy_and_pace(dtype):
    plain, there = models(dtype)
    requests = list(requests_of(plain, dtype))
    expected = final(plain, requests)
    with pretended_device() as counts:
        move(there, counts)
        found = final(there, [replace(r, prompt=DeviceTensor(r.prompt, counts)) for r in requests])
    assert not counts.promotions
    steps = max(state.statistics.steps for state in expected.values())
    for (what, where), number in counts.waits.items():
        most = ALLOWED.get((what, where.partition(":")[0]))
        assert most is not None, (what, where)
        assert number <= most * steps, (what, where)
    for number, state in expected.items():
        assert found[number].statistics.layer_tokens == state.statistics.layer_tokens
        if dtype == torch.float32:
            assert torch.equal(found[number].proposed, state.proposed), CACHES[number]


@pytest.mark.parametrize(
    ("cache", "kernels"),
    [
        ("dual", 440),
        ("frozen", 440),
        ("interval", 450),
        ("dkv", 450),
        ("mars", 440),
        ("sparse", 440),
        ("mars:drift=0.02", 450),
    ],
)
def test_a_cached_step_at_the_shape_of_8b(cache, kernels):
    """Without what combines attention to parts of the keys, a kernel of every layer."""
    joining, steps = count_work("8b", cache, frames=2, steps=4)
    step = typical_step(steps)
    assert step.combining == 32
    assert joining.waits == 0
    assert joining.kernels <= 4
    assert [work.waits for work in steps] == [1] * 4
    assert step.kernels <= kernels


def test_a_rule_that_looks_at_all_tokens_adds_few_kernels():
    _, steps = count_work("8b", "mars", frames=2, steps=4, commit="credit")
    assert [work.waits for work in steps] == [1] * 4
    assert typical_step(steps).kernels <= 450


@pytest.mark.parametrize(
    ("options", "kernels"), [({"commit": "credit"}, 450), ({"temperature": 0.7}, 460), ({"commit": "wino"}, 900)]
)
def test_a_step_of_rules_and_sampling_at_the_shape_of_8b(options, kernels):
    """WINO's masks pass through all layers once more, over the keys and values that are there, not over a copy."""
    (_, usual), (_, steps) = (count_work("8b", "dual", frames=64, steps=3, **given) for given in ({}, options))
    assert [work.waits for work in steps] == [1] * 3
    assert typical_step(steps).kernels <= kernels
    assert steps[-1].read_written < 2.1 * usual[-1].read_written


@pytest.mark.parametrize(("rows", "launches"), [(1, 180), (4, 420)])
def test_a_replayed_step_at_the_shape_of_8b(rows, launches):
    """A layer is two graphs, and between them what every request needs for itself."""
    _, eager = count_work("8b", "dual", frames=2, steps=2, rows=rows)
    _, steps = count_work("8b", "dual", frames=2, steps=4, rows=rows, graphs=True)
    assert [work.waits for work in steps] == [1] * 4
    assert steps[-1].kernels <= launches
    assert 1 <= steps[-1].read_written / eager[-1].read_written < 1.03


def test_the_last_layer_works_for_the_answer():
    """Of the others it computes keys and values: a full pass costs next to nothing in it."""
    for cache, answer in (("none", 32), ("full", 128)):
        _, (step,) = count_work("8b", cache, frames=8, steps=1)
        tokens = 8 * 210 + 2 * 32 + 128
        layer, kept = 2 * (4 * 4096**2 + 3 * 4096 * 12288), 4 * 4096**2
        expected = 31 * tokens * (layer + 4 * 4096 * tokens) + tokens * kept
        expected += answer * (layer - kept + 4 * 4096 * tokens) + 2 * 32 * 4096 * 126464
        assert step.flops == expected


def test_the_last_layer_works_for_the_answer_where_others_join_midway():
    """Frames join in the seventeenth layer; in the last one they and the text leave only keys and values."""
    _, (_, step) = count_work("8b", "mars:text=1,ratio=1,group=16", frames=8, steps=2)
    text, answer = 2 * 32, 128
    tokens = 8 * 210 + text + answer
    layer, kept = 2 * (4 * 4096**2 + 3 * 4096 * 12288), 4 * 4096**2
    full = layer + 4 * 4096 * tokens  # of one position
    expected = 16 * (text + answer) * full + 15 * tokens * full + tokens * kept + answer * (full - kept)
    assert step.flops == expected + 2 * 32 * 4096 * 126464


def test_requests_share_one_wait():
    _, alone = count_work("mid", "dual", frames=2, steps=3)
    _, together = count_work("mid", "dual", frames=2, steps=3, rows=4)
    assert [work.waits for work in together] == [1] * 3
    assert typical_step(together).kernels < 3 * typical_step(alone).kernels


def test_chunked_refreshes_do_not_wait():
    _, steps = count_work("mid", "mars:window=1,fused=false,text=1,ratio=1,pyramid=1", frames=3, steps=3)
    assert [work.waits for work in steps] == [1] * 3


def test_bytes_and_arithmetic_of_a_cached_step():
    """Weights once, keys and values once, and little else."""
    _, steps = count_work("8b", "frozen", frames=64, steps=2)
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 12288) + 4096 * 126464)
    keys_values = 2 * 2 * 32 * 4096 * (64 * 210 + 2 * 32 + 128)
    assert 1 < steps[1].read_written / (weights + keys_values) < 1.1
    active = 128  # frozen runs the whole answer
    products = 2 * active * 32 * (4 * 4096**2 + 3 * 4096 * 12288) + 2 * 32 * 4096 * 126464
    attention = 4 * active * 4096 * 32 * (64 * 210 + 2 * 32 + 128)
    assert steps[1].flops == products + attention


def test_what_cuda_would_refuse_is_refused():
    with pretended_device() as counts:
        there, here = DeviceTensor(torch.ones(3), counts), torch.ones(3)
        with pytest.raises(MixedDevicesError):
            there + here
        with pytest.raises(MixedDevicesError):
            here[torch.arange(2, device=DEVICE)]
        with pytest.raises(MixedDevicesError):
            torch.cat((there, here))
        assert torch.equal((there + 1).cpu(), torch.full((3,), 2.0))
        assert there.to("cpu", torch.float64).dtype == torch.float64
        assert counts.waits.total() == 2
        assert int(there[0]) == 1
        assert there[there > 0].shape == (3,)
        assert counts.waits.total() == 4
        there + there.double()
        assert counts.promotions.total() == 1


def test_what_the_host_waits_for():
    """A copy from memory that is not pinned, and a size that is up to values; not a number among tensors."""
    with pretended_device() as counts:
        there, mask = torch.ones(3, device=DEVICE), torch.tensor([True, False, True], device=DEVICE)
        counts.take()
        pinned = torch.arange(3.0).pin_memory()
        counts.take()  # what is pinned stays so
        for source, waits in ((pinned, 0), (pinned[1:], 0), (torch.ones(4, pin_memory=True), 0), (torch.ones(3), 1)):
            source.to(DEVICE, non_blocking=True)
            there[: len(source)].copy_(source[:3], non_blocking=True)
            taken = counts.take()
            assert (taken.waits.total(), taken.uploads.total()) == (2 * waits, 2 - 2 * waits)
        pinned.to(DEVICE)
        assert counts.take().waits.total() == 1
        twice = torch.full((3,), 2, device=DEVICE)
        there.repeat_interleave(twice)
        assert counts.take().waits.total() == 1
        there.repeat_interleave(twice, output_size=6)
        there.repeat_interleave(2)
        assert torch.where(mask, there, 0.0).contents.tolist() == [1.0, 0.0, 1.0]
        assert torch.where(mask, 1, 2).dtype == torch.int64
        taken = counts.take()
        assert not taken.waits
        assert sum(number for (what, _), number in taken.kernels.items() if what == "full") == 3


def test_what_is_more_than_one_kernel():
    with pretended_device() as counts:
        there, places = torch.ones(3, device=DEVICE), torch.zeros(1, dtype=torch.long, device=DEVICE)
        for run, kernels in (
            (lambda: there.index_fill(0, places, 2.0), 2),
            (lambda: there.index_copy(0, places, there[:1]), 2),
            (lambda: there.masked_fill(there > 1, 0.0), 3),
            (lambda: there.index_fill_(0, places, 2.0), 1),
        ):
            counts.take()
            run()
            assert counts.take().kernels.total() == kernels
        for dtype, keys, mask, combining in (
            (torch.bfloat16, 512, False, 1),
            (torch.bfloat16, 64, False, 0),
            (torch.float32, 512, False, 0),
            (torch.bfloat16, 512, True, 0),
        ):
            queries, states = (torch.ones(1, 2, size, 8, dtype=dtype, device=DEVICE) for size in (4, keys))
            seen = torch.ones(4, keys, dtype=torch.bool, device=DEVICE) if mask else None
            counts.take()
            F.scaled_dot_product_attention(queries, states, states, attn_mask=seen)
            taken = counts.take()
            assert (taken.kernels.total(), taken.combining.total()) == (1, combining)
        numbers = torch.ones(3, dtype=torch.int8, device=DEVICE)
        counts.take()
        torch.mul(numbers, there, out=torch.empty_like(there))
        assert counts.take().read_written["mul"] == 3 + 12 + 12


def test_the_table():
    ways = [{"cache": "dual"}, {"cache": "none"}, {"cache": "mars", "commit": "credit"}]
    figures = count_figures("mid", frames=2, ways=ways, gen_length=6, block_length=6, steps=6)
    assert [row["settings"] for row in figures["rows"]] == ways
    text = count_table(figures)
    assert text.count("\n| ") == 4
    launches = {cells[1].strip(): cells[4].strip() for line in text.splitlines() if len(cells := line.split("|")) > 4}
    assert launches["none"] == "–" != launches["dual"]  # no graph of it was ever replayed
    assert "mars, commit credit" in launches
    few = count_figures("mid", frames=2, ways=ways[:1], gen_length=4, block_length=4, steps=2)
    assert "| – |" in count_table(few)
    with pytest.raises(InputError, match="steps is the same in all rows"):
        count_figures("mid", ways=[{"cache": "dual", "steps": 4}])
    with pytest.raises(InputError, match="unknown"):
        count_figures("mid", ways=[{"cache": "dual", "commit": "luck"}])


def test_the_command():
    options = ["--size", "mid", "--frames", "2", "--steps", "3", "--gen-length", "4", "--block-length", "4"]
    asked = ["--cache", "mars", "--commit", "credit", "--also", "temperature=0.7"]
    done = CliRunner().invoke(main, ["bench", "count", *options, *asked, "--json"])
    assert done.exit_code == 0, done.output
    settings = [row["settings"] for row in json.loads(done.stdout)["rows"]]
    plain = {"cache": "mars", "commit": "credit"}
    assert settings == [plain, {**plain, "temperature": 0.7}]
