"""Which kernels of attention a GPU would be asked for. Nothing is run on one."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from random_requests import random_request
from torch.nn.attention import SDPBackend

from vidlada.decoding import kv_cache, sampler, verify
from vidlada.decoding.kv_cache import attention_kernels, backends
from vidlada.decoding.sampler import Denoiser


def test_kernels_of_attention_on_a_gpu():
    """Every list ends in kernels that take masks."""
    assert backends(32)[0] == SDPBackend.FLASH_ATTENTION and SDPBackend.CUDNN_ATTENTION not in backends(256)
    assert backends(257)[0] == SDPBackend.CUDNN_ATTENTION
    assert all(found[-1] == SDPBackend.MATH for found in (backends(1), backends(10_000)))
    assert isinstance(attention_kernels(torch.device("cpu"), 1), nullcontext)
    with attention_kernels(torch.device("cuda"), 1):
        F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 4, 8))


@pytest.mark.parametrize("cache", ["none", "dual", "mars", "elastic", "dllm"])
@pytest.mark.parametrize("commit", ["topk", "wino"])
def test_every_request_has_the_kernels_of_its_own_queries(small, monkeypatch, cache, commit):
    """However many run together, and while another joins with a long first pass."""
    if cache == "none" and commit == "wino":
        pytest.skip("WINO needs a cache")
    chosen, seen, attend = [0], [], F.scaled_dot_product_attention

    @contextmanager
    def choose(device, queries):
        chosen.append(queries)
        yield
        chosen.pop()

    def observe(queries, keys, values, **options):
        seen.append((queries.shape[-2], backends(chosen[-1]) == backends(queries.shape[-2])))
        return attend(queries, keys, values, **options)

    for module in (kv_cache, sampler, verify):
        monkeypatch.setattr(module, "attention_kernels", choose)
    monkeypatch.setattr(F, "scaled_dot_product_attention", observe)
    monkeypatch.setattr(kv_cache, "FEW_QUERIES", 20)
    denoiser, index = Denoiser(small.model), [-1] * 3 + [0] * 20
    for seed in range(3):
        denoiser.add(random_request(small.model, index, seed=seed, cache=cache, commit=commit))
    denoiser.step()
    denoiser.add(random_request(small.model, index, seed=3, cache=cache, commit=commit))
    seen.clear()
    for _ in range(3):
        denoiser.step()
    few, many = ([right for queries, right in seen if (queries <= 20) == kind] for kind in (True, False))
    assert many and all(many)
    # the last layer of a long pass asks for the answer alone, with the kernels of the other layers
    assert few.count(False) <= len(many)
