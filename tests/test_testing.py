"""The tools that judge the rest: tolerance rule, memory, timing, cases."""

import time

import pytest
import torch
from torch import nn

from resfuse.testing import tolerances
from resfuse.testing.cases import (
    CASES,
    PROJECTIONS,
    RELATIVES,
    SMALL,
    SMALL_FAMILY,
    STAGES,
    make_block,
    make_gradient,
    make_input,
)
from resfuse.testing.comparison import MODES, compare_case
from resfuse.testing.memory import peak_bytes, saved_bytes
from resfuse.testing.timing import interleave, median_interval, ratio, summary

NAN = float("nan")


def test_relative_error():
    ref = torch.tensor([3.0, 4.0])
    assert tolerances.relative_error(torch.tensor([3.0, 4.5]), ref) == pytest.approx(0.1)
    assert tolerances.relative_error(ref, ref) == 0
    assert tolerances.relative_error(torch.tensor([NAN, 4.0]), ref) != tolerances.relative_error(ref, ref)
    with pytest.raises(ValueError, match="shapes differ"):
        tolerances.relative_error(ref, ref[:1])


@pytest.mark.parametrize("dtype, factor", [(torch.float32, 2.0), (torch.bfloat16, 1.2), (torch.float16, 1.2)], ids=str)
def test_the_rule_passes_to_its_factor_and_no_further(dtype, factor):
    eager = [0.1] * 10
    limit = factor * 0.1 + 2 * torch.finfo(dtype).eps
    tolerances.check("dx", [0.999 * limit] * 10, eager, dtype)
    with pytest.raises(AssertionError, match="dx: median error"):
        tolerances.check("dx", [1.001 * limit] * 10, eager, dtype)


def test_nan_never_passes_and_a_flip_in_one_seed_does():
    with pytest.raises(AssertionError):
        tolerances.check("out", [0.1] * 9 + [NAN], [0.1] * 10, torch.float32)
    tolerances.check("out", [0.1] * 9 + [10.0], [0.1] * 10, torch.float32)
    with pytest.raises(AssertionError):
        tolerances.check("out", [0.1] + [10.0] * 9, [0.1] * 10, torch.float32)


def test_without_kinks_the_median_decides():
    """But for a result that is zero but for rounding, whose error in eager is as large as itself."""
    ours = [0.1] * 4 + [0.3] * 6
    tolerances.check("dx", ours, [0.1] * 10, torch.float32, kinks=True)
    with pytest.raises(AssertionError, match="dx: median error"):
        tolerances.check("dx", ours, [0.1] * 10, torch.float32, kinks=False)
    tolerances.check("dbias", [10 * a for a in ours], [1.0] * 10, torch.float32, kinks=False)
    with pytest.raises(AssertionError):
        tolerances.check("dbias", [3.0] * 9 + [1.0], [1.0] * 10, torch.float32, kinks=False)


def test_variances_are_held_channel_by_channel():
    ref, eps = torch.tensor([1.0, 2.0], dtype=torch.float64), tolerances.EPS32
    tolerances.check_variance("var3", ref * (1 + 3 * eps), ref)
    tolerances.check_variance("var3", ref * (1 + 30 * eps), ref, torch.tensor([10.0, 10.0]))
    with pytest.raises(AssertionError, match="channel 1"):
        tolerances.check_variance("var3", ref * torch.tensor([1, 1 + 30 * eps], dtype=torch.float64), ref)


def test_kappa_of_opposite_weights():
    cov = torch.tensor([[1.0, 0.99], [0.99, 1.0]], dtype=torch.float64)
    var = torch.tensor([0.02, 3.98], dtype=torch.float64)
    weight = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    assert tolerances.kappa(weight, cov, var).tolist() == pytest.approx([199.0, 1.0])


def test_saved_bytes_of_a_known_graph():
    model, x = nn.Linear(8, 4), torch.randn(16, 8)
    middle, out = 16 * 4 * 4, 16 * 4 * 4
    # Linear keeps its input, ReLU its output; the output itself counts once.
    assert saved_bytes(lambda: model(x).relu(), model) == x.nbytes + out
    assert saved_bytes(lambda: model(x).relu(), model, [x]) == out
    assert saved_bytes(lambda: model(x).sigmoid().relu(), model, [x]) == middle + out
    with torch.no_grad():
        assert saved_bytes(lambda: model(x), model) == out


def test_peak_bytes_of_known_allocations():
    def call():
        a = torch.ones(1 << 20)
        b = a + 1
        del a
        return b + 1

    peak = peak_bytes(call)
    assert 2 * (4 << 20) <= peak < 2.1 * (4 << 20)


def test_rounds_are_interleaved_and_rotated():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleave(calls, budget=60, minimum=3, maximum=3, warmup=0)
    assert "".join(order) == "abcbcacab" and all(len(t) == 3 for t in times.values())


def test_a_budget_ends_rounds_but_not_before_the_least():
    calls = {"slow": lambda: time.sleep(0.02)}
    assert len(interleave(calls, budget=1e-6, minimum=4, warmup=0)["slow"]) == 4
    assert 4 < len(interleave(calls, budget=0.3, minimum=4, warmup=0)["slow"]) <= 15
    with pytest.raises(ValueError, match="minimum"):
        interleave({}, budget=1)


def test_summaries_and_intervals():
    assert summary([3.0, 1.0, 2.0])[:1] == (2.0,) and summary([5.0])[:3] == (5.0, 5.0, 5.0)
    found = ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert (found.median, found.pairs, found.low, found.high) == (2.0, 3, 2.0, 3.0)
    # Order statistics 2 and 9 of ten hold the median with probability 1 - 2 * 11 / 1024.
    low, high, coverage = median_interval([float(i) for i in range(1, 11)])
    assert (low, high) == (2.0, 9.0) and coverage == pytest.approx(1 - 22 / 1024)


@pytest.mark.parametrize("case", [*STAGES, *PROJECTIONS, *RELATIVES, *SMALL], ids=lambda case: case.name)
def test_blocks_have_their_cases_shapes(case):
    with torch.device("meta"):
        block = make_block(case, device="meta")
    assert block.conv2.weight.shape[:2] == (case.width, case.width // case.groups)
    assert block.conv1.in_channels == case.in_channels and block.conv3.out_channels == case.out_channels
    assert (block.downsample is not None) == case.projection


@pytest.mark.parametrize("case", [*SMALL, *SMALL_FAMILY], ids=lambda case: case.name)
def test_inputs_and_gradients_fit(case):
    block, x, dout = make_block(case, 1), make_input(case, seed=1), make_gradient(case, seed=1)
    assert block(x).shape == dout.shape == case.output_shape
    assert torch.equal(x, make_input(case, seed=1)) and not torch.equal(x, make_input(case, seed=2))


def test_blocks_without_kinks_flip_no_relu():
    case = CASES["small-projection"]
    block, values = make_block(case, kinks=False), {}
    for name in ("bn1", "bn2"):
        block.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: values.update({name: out.clone()}))
    block(make_input(case))
    for out in values.values():
        assert out.abs().min() > 1 and (out > 0).any() and (out < 0).any()


def test_a_wrong_block_is_caught():
    """What the comparison is for: a fuse that scales gamma 3 is seen in every mode."""

    def wrong(block):
        block.bn3.weight.data.mul_(1.1)
        return block

    for mode in ("float32", "autocast-bfloat16"):
        errors = compare_case(CASES["small-identity"], wrong, MODES[mode], range(3), kinks=False)
        with pytest.raises(AssertionError, match="dx"):
            tolerances.check("dx", errors["dx"].ours, errors["dx"].eager, MODES[mode].compute)
