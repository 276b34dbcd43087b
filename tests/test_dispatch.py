"""Which set `auto` asks first where a measurement says so, and how measurements become lines of the table."""

import pytest
import torch

from benchmarks import preferences
from resfuse.kernels import cuda, dispatch, measured, triton
from resfuse.kernels.interface import Reason, Unsupported
from resfuse.kernels.measured import Preference

HERE = (9, 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that the table knows, with both sets proven; nothing runs on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: HERE)
    monkeypatch.setattr(measured, "PROVEN", {"triton": (HERE,), "cuda": (HERE,)})
    monkeypatch.setattr(measured, "UNPROVEN", {})
    for each in (triton, cuda):
        monkeypatch.setattr(each, "unsupported", lambda device, dtype: [])
    lines = [
        Preference(HERE, torch.bfloat16, "covariance", "cuda", "1.3x triton"),
        Preference((8, 0), torch.bfloat16, "bn_stats", "cuda", "1.2x triton"),
        Preference(HERE, torch.float32, "bn_reduce", "cuda", "1.1x triton"),
    ]
    monkeypatch.setattr(measured, "PREFERENCES", tuple(lines))
    dispatch.kernels.cache_clear()
    yield
    dispatch.kernels.cache_clear()


def test_the_measured_set_comes_first(gpu):
    chosen = dispatch.kernels("auto", "cuda", torch.bfloat16).chosen
    assert {p for p, name in chosen.items() if name == "cuda"} == {"covariance"}
    assert chosen["bn_stats"] == "triton", "that line is of another GPU"
    assert dispatch.kernels("auto", "cuda", torch.float32).chosen["bn_reduce"] == "cuda"


def test_what_it_refuses_goes_to_the_next(gpu, monkeypatch):
    def refuse(a):
        raise Unsupported([Reason("layout", "not channels_last")])

    from resfuse.kernels.cuda import covariance as of_cuda
    from resfuse.kernels.triton import covariance as of_triton

    monkeypatch.setattr(of_cuda, "covariance", refuse)
    monkeypatch.setattr(of_triton, "covariance", lambda a: ("triton", a))
    monkeypatch.setattr(dispatch, "_fallbacks", {})
    assert dispatch.kernels("auto", "cuda", torch.bfloat16).covariance(1) == ("triton", 1)
    assert dispatch.fallbacks() == [("covariance", "cuda", Reason("layout", "not channels_last"))]


def test_an_unproven_set_is_not_preferred(gpu, monkeypatch):
    monkeypatch.setattr(measured, "PROVEN", {"triton": ((8, 0),), "cuda": ()})
    assert set(dispatch.kernels("auto", "cuda", torch.bfloat16).chosen.values()) == {"eager"}


def test_newer_primitives_of_a_proven_set_wait(gpu, monkeypatch):
    monkeypatch.setattr(measured, "UNPROVEN", {"triton": ("bn_act",), "cuda": ("bn_act",)})
    chosen = dispatch.kernels("auto", "cuda", torch.bfloat16).chosen
    assert chosen["bn_act"] == "eager" and chosen["bn_act_backward"] == chosen["bn_stats"] == "triton"
    assert dispatch.kernels("triton", "cuda", torch.bfloat16).chosen["bn_act"] == "triton", "asked for by name"


def test_no_device_is_asked_where_the_table_has_nothing(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: pytest.fail("asked"))
    assert measured.preferred("cpu", torch.bfloat16) == {}
    monkeypatch.setattr(measured, "PREFERENCES", ())
    assert measured.preferred("cuda", torch.bfloat16) == {}


def test_lines_from_measurements():
    def row(primitive, name, median, case="stage1"):
        return {"primitive": primitive, "set": name, "median": median, "case": case, "dtype": "bfloat16"}

    rows = [
        row("covariance", "triton", 3.0), row("covariance", "cuda", 2.0), row("covariance", "eager", 0.1),
        row("covariance", "triton", 1.0, "stage2"), row("covariance", "cuda", 1.0, "stage2"),
        row("bn_stats", "triton", 1.0), row("bn_stats", "cuda", 0.99),  # too little
        row("expand", "triton", 9.0),  # alone
        row("conv_backward, input", "triton", 2.0), row("conv_backward, input", "cuda", 1.0),
        row("conv_backward, weight", "triton", 1.0), row("conv_backward, weight", "cuda", 3.0),
        row("3x3 conv_stats", "triton", 2.0), row("3x3 conv_stats", "cuda", 1.0),
    ]  # fmt: skip
    environment = {"device": "A GPU", "commit": "abc", "gpu": {"capability": "9.0"}}
    (line,) = preferences.lines({"environment": environment, "rows": rows}, "primitives.json")
    found = eval(line, {"Preference": Preference, "torch": torch})[0]
    assert found == Preference(HERE, torch.bfloat16, "covariance", "cuda", "1.33x triton, A GPU, abc, primitives.json")
