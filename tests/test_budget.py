"""A run's seconds: who may compile, what rounds get, and that a compiler can be stopped."""

import time

import pytest

from resfuse.bench.budget import GENEROUS, MEASURING, Budget
from resfuse.bench.plan import Job
from resfuse.bench.precompile import precompile
from resfuse.kernels.interface import Reason


def job(seconds, compile_seconds=0.0):
    return Job("stage1", "float32", 8, 8, ("eager", "resfuse"), seconds, compile_seconds)


def test_a_compilation_that_does_not_fit_names_the_budget_that_would_do():
    rest = [job(20.0, 110.0)]
    refusal = Budget(100.0).compile_time(rest)
    assert isinstance(refusal, Reason) and refusal.code == "compile_budget"
    enough = float(refusal.text.split("--budget ")[1].split()[0])
    assert not isinstance(Budget(enough).compile_time(rest), Reason)
    assert isinstance(Budget(enough - 20).compile_time(rest), Reason)


def test_short_compilations_go_before_long_ones():
    short, long = job(4.0, 20.0), job(20.0, 110.0)
    budget = Budget(150.0)
    assert not isinstance(budget.compile_time([short, long]), Reason), "the long one is not reserved for"
    assert isinstance(Budget(142.0).compile_time([long, short]), Reason)
    assert not isinstance(Budget(142.0).compile_time([long]), Reason), "without the short one it fits"


def test_a_warm_cache_lowers_what_is_expected_not_the_deadline():
    budget, rest = Budget(200.0), [job(4.0, 20.0)]
    budget.compiled(rest[0], 2.0)
    assert budget.compile_time(rest) == pytest.approx(40.0, abs=0.1)
    assert not isinstance(budget.compile_time([job(20.0, 1000.0)]), Reason), "expected to take a tenth"


def test_a_slow_first_compilation_leaves_the_others_their_time():
    budget, rest = Budget(290.0), [job(4.0, 20.0), job(20.0, 110.0)]
    before = budget.rounds_time(rest)
    budget.compiled(rest[0], 40.0)
    assert budget.rounds_time(rest) == pytest.approx(before, abs=0.1), "the long one is still reserved for"


def test_rounds_share_what_is_left():
    budget, rest = Budget(100.0), [job(10.0), job(30.0)]
    assert budget.rounds_time(rest) == pytest.approx(MEASURING * 100 / 4, rel=0.01)
    assert budget.rounds_time(rest[:1]) == GENEROUS * 10.0
    assert Budget(1e-9).rounds_time(rest) == 1.0, "the fewest rounds are always run"


def test_a_compiler_is_stopped_at_its_deadline():
    began = time.perf_counter()
    outcome = precompile("stage1", "float32", 8, "torch.compile", "cpu", 1.0)
    assert isinstance(outcome, Reason) and outcome.code == "compile_budget"
    assert time.perf_counter() - began < 20


def test_a_compiler_that_fails_says_why():
    outcome = precompile("no-such-subject", "float32", 8, "torch.compile", "cpu", 120.0)
    assert isinstance(outcome, Reason) and outcome.code == "compile_failed" and "no-such-subject" in outcome.text
