"""Random numbers by place."""

import torch

from vidlada.decoding import counter_noise
from vidlada.decoding.counter_noise import mix_bits, uniform

CPU = torch.device("cpu")


def test_splitmix64():
    """The first outputs of the published generator for seed 1234567, as its authors' C code gives them."""
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + gamma * n) % 2**64 for n in (1, 2, 3)]
    signed = torch.tensor([state - 2**64 if state >= 2**63 else state for state in states])
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(value) % 2**64 for value in mix_bits(signed)] == expected


def test_uniform():
    numbers = uniform(3, 1, 200, 500, CPU)
    assert 0 < numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.005
    assert abs(numbers.var() - 1 / 12) < 0.002
    assert len(numbers.unique()) == numbers.numel()
    neighbours = torch.stack((numbers[:, :-1].flatten(), numbers[:, 1:].flatten()))
    assert abs(torch.corrcoef(neighbours)[0, 1]) < 0.01


def test_the_largest_number_is_below_one(monkeypatch):
    """Or Gumbel noise would divide by the logarithm of 1."""
    monkeypatch.setattr(counter_noise, "mix_bits", lambda numbers: torch.full_like(numbers, -1))
    assert 0.999 < uniform(0, 1, 1, 1, CPU) < 1


def test_seeds_and_draws_differ():
    first = uniform(0, 1, 4, 50, CPU)
    assert torch.equal(first, uniform(0, 1, 4, 50, CPU))
    for other in (uniform(1, 1, 4, 50, CPU), uniform(0, 2, 4, 50, CPU), uniform(1, 0, 4, 50, CPU)):
        assert not torch.isin(first, other).any()
