"""Errors against float64 within the project's tolerance rule, beside eager's own, in every storage dtype."""

from dataclasses import replace

import pytest
import torch

import resfuse
from resfuse.testing.cases import (
    CASES,
    FAMILY,
    PROJECTIONS,
    RELATIVES,
    SMALL,
    SMALL_FAMILY,
    STAGES,
    BottleneckCase,
    make_block,
    make_gradient,
    make_input,
)
from resfuse.testing.comparison import MODES, check_case, compare
from resfuse.testing.tolerances import check, check_variance, kappa

fuse = resfuse.fuse


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 as such on a GPU too: torch takes tf32 for some convolutions there, and the errors are beside its own."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.one_in(6, device="cpu")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_small_blocks(case, mode, device):
    check_case(case, fuse, MODES[mode], device=device)


@pytest.mark.gate
@pytest.mark.one_in(6, device="cpu")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [case for case in SMALL if case.rows > 5], ids=lambda case: case.name)
def test_small_blocks_without_kinks(case, mode, device):
    """Rounding alone: medians hardly vary, so this holds the rule to its factors."""
    check_case(case, fuse, MODES[mode], device=device, kinks=False)


@pytest.mark.gate
@pytest.mark.one_in(6, device="cpu")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SMALL_FAMILY, ids=lambda case: case.name)
def test_the_small_family_without_kinks(case, mode, device):
    check_case(case, fuse, MODES[mode], device=device, kinks=False)


@pytest.mark.parametrize("mode", ["float32", "autocast-bfloat16"])
@pytest.mark.parametrize("case", SMALL_FAMILY[:2], ids=lambda case: case.name)
def test_small_basic_blocks(case, mode, device):
    check_case(case, fuse, MODES[mode], device=device)


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast-float16"])
@pytest.mark.parametrize("name", ["small-identity", "small-strided", "small-bias"])
def test_small_blocks_in_eval_mode(name, mode, device):
    check_case(CASES[name], fuse, MODES[mode], training=False, device=device)


@pytest.mark.parametrize("mode", ["float32", "autocast-bfloat16"])
def test_nchw(mode, device):
    check_case(CASES["small-strided"], fuse, MODES[mode], memory_format=torch.contiguous_format, device=device)


def sized(case, batch):
    """The case at a smaller resolution: its channels, a few hundred rows."""
    return replace(case, batch=batch, height=min(case.height, 14))


STAGE_SHAPES = [sized(case, 2) for case in (*STAGES, *PROJECTIONS)]


@pytest.mark.parametrize("case", STAGE_SHAPES, ids=lambda case: case.name)
def test_stage_channels_in_float32(case, device):
    check_case(case, fuse, MODES["float32"], seeds=range(3), device=device)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [*STAGES, *PROJECTIONS, *RELATIVES], ids=lambda case: case.name)
def test_stage_shapes(case, mode, device):
    check_case(replace(case, batch=2 if device == "cpu" else 16), fuse, MODES[mode], device=device)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", FAMILY, ids=lambda case: case.name)
def test_the_familys_shapes(case, mode, device):
    case = replace(case, batch=2 if device == "cpu" else 16)
    check_case(case, fuse, MODES[mode], range(5), device=device, kinks=False)


def test_small_gradients_in_float16(device):
    """Small gradients: what the backward pass makes of them must not underflow before they do."""
    case = BottleneckCase("small gradients", 64, 16, 64, 28, batch=4)
    errors = {}
    for seed in range(5):
        block = make_block(case, seed, device=device, kinks=False)
        x = make_input(case, torch.float16, seed=seed, device=device)
        dout = make_gradient(case, torch.float16, seed=seed, device=device) * 2.0**-15
        for name, (eager, ours) in compare(block, x, dout, fuse, MODES["autocast-float16"]).items():
            errors.setdefault(name, ([], []))[0].append(ours)
            errors[name][1].append(eager)
    for name, (ours, eager) in errors.items():
        check(name, ours, eager, torch.float16, kinks=False)


def test_the_limit_near_duplicate_channels_with_opposite_weights():
    """A variance that comes from cancelling weights is ill-conditioned, more so through the covariance; its error is
    bounded by eps32 * kappa, and this documents how large that may be."""
    from resfuse.kernels.eager.covariance import covariance
    from resfuse.kernels.eager.expand_stats import expand_stats

    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4096, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(4096, 2, generator=generator, dtype=torch.float64)
    for spread in (1e-1, 1e-2, 1e-3):
        y = (base + spread * noise).float()
        weight = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
        image = y.T.reshape(1, 2, 64, 64).contiguous(memory_format=torch.channels_last)
        mean, cov = covariance(image)
        var = expand_stats(weight, mean, cov).var
        rows = y.double()
        exact = (rows @ weight.double().T).var(0, correction=0)
        condition = kappa(weight, torch.cov(rows.T, correction=0), exact)
        check_variance(f"spread {spread}", var, exact, condition)
        assert condition[0] > 1 / spread**2 and condition[1] < 1.1
