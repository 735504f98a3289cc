"""Number types of a run, and Muon in float32."""

import pytest
import torch
from trainings import run

from vidlada.training.optimizers import Float32Muon
from vidlada.training.precision import run_precision


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_muon_in_float32_does_what_torch_s_does(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(4)]
    found = []
    for kind in (torch.optim.Muon, Float32Muon):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = kind([parameter], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        found.append((parameter.detach(), optimizer.state_dict()))
    (expected, before), (parameter, after) = found
    assert (expected - start).norm() > 5 * (expected - parameter).norm()  # bfloat16's rounding between them
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"])  # so that either continues the other's checkpoints


@pytest.mark.parametrize(("products", "expected"), [(True, "bf16"), (False, "no")])
def test_precision_by_itself(tmp_path, monkeypatch, products, expected):
    config = run(tmp_path, precision="auto")
    assert run_precision(config) in ("bf16", "no")
    monkeypatch.setattr("vidlada.training.precision.multiplies_bfloat16", lambda: products)
    assert run_precision(config) == expected
    assert run_precision(run(tmp_path, precision="bf16")) == "bf16"
