"""Errors against float64 within the project's tolerance rule, beside eager's own, in every storage dtype."""

import pytest
import torch

import resfuse
from resfuse.testing.cases import CASES, PROJECTIONS, SMALL, STAGES, make_block, make_input
from resfuse.testing.comparison import MODES, check_case
from resfuse.testing.tolerances import check_variance, kappa

fuse = resfuse.fuse


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_small_blocks(case, mode, device):
    check_case(case, fuse, MODES[mode], device=device)


@pytest.mark.gate
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [case for case in SMALL if case.rows > 5], ids=lambda case: case.name)
def test_small_blocks_without_kinks(case, mode, device):
    """Rounding alone: medians hardly vary, so this holds the rule to its factors."""
    check_case(case, fuse, MODES[mode], device=device, kinks=False)


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast-float16"])
@pytest.mark.parametrize("name", ["small-identity", "small-strided", "small-bias"])
def test_small_blocks_in_eval_mode(name, mode, device):
    check_case(CASES[name], fuse, MODES[mode], training=False, device=device)


@pytest.mark.parametrize("mode", ["float32", "autocast-bfloat16"])
def test_nchw(mode, device):
    check_case(CASES["small-strided"], fuse, MODES[mode], memory_format=torch.contiguous_format, device=device)


def sized(case, batch):
    """The case at a smaller resolution: its channels, a few hundred rows."""
    return case.__class__(**{**case.__dict__, "batch": batch, "height": 14 if case.height > 14 else case.height})


STAGE_SHAPES = [sized(case, 2) for case in (*STAGES, *PROJECTIONS)]


@pytest.mark.parametrize("case", STAGE_SHAPES, ids=lambda case: case.name)
def test_stage_channels_in_float32(case, device):
    check_case(case, fuse, MODES["float32"], seeds=range(3), device=device)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [c for c in CASES.values() if c not in SMALL], ids=lambda case: case.name)
def test_stage_shapes(case, mode, device):
    case = case.__class__(**{**case.__dict__, "batch": 2 if device == "cpu" else 16})
    check_case(case, fuse, MODES[mode], device=device)


@pytest.mark.parametrize("name", ["small-identity", "small-projection", "ragged"])
def test_variances_stay_within_their_condition(name, device):
    """float32 variances from a covariance: 4 eps32 kappa channel by channel, whatever eager's own error."""
    case = CASES[name]
    for seed in range(10):
        block, twin = (make_block(case, seed, dtype, device=device) for dtype in (torch.float32, torch.float64))
        for module in block.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0  # the buffer is then the batch's own variance
        seen = {}
        for norm in ("bn3", "downsample.1") if case.projection else ("bn3",):
            conv = twin.get_submodule(norm.replace("bn3", "conv3").replace("downsample.1", "downsample.0"))

            def note(conv, args, out, seen=seen, norm=norm):
                seen[norm] = (conv.weight, args[0], out)

            conv.register_forward_hook(note)
        x = make_input(case, seed=seed, device=device)
        fuse(block)(x), twin(x.double())
        for norm, (weight, a, z) in seen.items():
            cov = torch.cov(a.permute(1, 0, 2, 3).flatten(1), correction=0)
            var = z.var((0, 2, 3), correction=0)
            ours = block.get_submodule(norm).running_var.double() * (case.rows - 1) / case.rows
            check_variance(f"{name} {norm}", ours, var, kappa(weight, cov, var))


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
