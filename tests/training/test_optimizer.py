"""The optimizer alone: AdamW on float32 masters, and the learning rate schedule."""

import pytest
import torch

from granite_speech.training import learning_rate, parameter_groups
from granite_speech.training.optimizer import MasterAdamW, ParameterGroup


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    rates = [learning_rate(step, 100, peak=2.0, warmup=0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[10] == 2.0 and max(rates) == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.01
    assert rates[55] == pytest.approx(1.0)
    assert learning_rate(0, 1, peak=1.0, warmup=0.0) == 1.0
    assert learning_rate(0, 1, peak=1.0, warmup=1.0) == 1.0


def test_the_optimizer_equals_torchs_adamw():
    """With weight decay for matrices only, clipping by the total norm, and a rate for each group."""
    rng = torch.Generator().manual_seed(0)
    mine = {name: torch.nn.Parameter(torch.randn(shape, generator=rng)) for name, shape in (("w", (3, 4)), ("b", (4,)), ("v", (2, 2)))}
    theirs = {name: torch.nn.Parameter(one.detach().clone()) for name, one in mine.items()}
    groups = [*parameter_groups({name: mine[name] for name in "wb"}, 0.1), ParameterGroup({"v": mine["v"]}, 0.0, rate=0.5)]
    optimizer = MasterAdamW(groups)
    reference = torch.optim.AdamW(
        [
            {"params": [theirs["w"]], "weight_decay": 0.1},
            {"params": [theirs["b"]], "weight_decay": 0.0},
            {"params": [theirs["v"]], "weight_decay": 0.0, "lr": 0.01},
        ],
        lr=0.02,
    )
    for _ in range(5):
        gradients = {name: 10 * torch.randn(one.shape, generator=rng) for name, one in mine.items()}
        for parameters in (mine, theirs):
            for name, one in parameters.items():
                one.grad = gradients[name].clone()
        assert optimizer.clip(1.0) == torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0) > 1
        optimizer.collect()
        optimizer.step(0.02)
        reference.step()
    for name, one in mine.items():
        assert torch.allclose(one, theirs[name], atol=1e-6), name


def test_masters_keep_changes_that_bfloat16_would_lose():
    """Steps smaller than a weight's rounding error add up, and so do gradients of several batches."""
    weight = torch.nn.Parameter(torch.full((2, 2), 1.0, dtype=torch.bfloat16))
    optimizer = MasterAdamW([ParameterGroup({"w": weight})])
    for _ in range(30):
        for _ in range(3):
            weight.grad = torch.tensor([[1.0, 2**-9], [1.0, 1.0]], dtype=torch.bfloat16)
            optimizer.collect()
        assert optimizer.masters["w"].grad[0, 1] == 3 * 2**-9 and weight.grad is None
        optimizer.step(1e-3)
    assert optimizer.masters["w"].dtype == torch.float32
    assert torch.allclose(optimizer.masters["w"], torch.tensor(0.97), atol=1e-4)
    assert torch.equal(weight, optimizer.masters["w"].bfloat16()) and weight.dtype == torch.bfloat16
