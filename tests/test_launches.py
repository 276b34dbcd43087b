"""Launches in batches, against a library that stands for the driver.

Steps whose kernels are C functions on a CPU's memory are noted and done again, in batches and one by one.
"""

import ctypes
import gc
import re
import shutil
import struct
import subprocess
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resfuse import _native
from resfuse.functions import source
from resfuse.functions.notes import Notes
from resfuse.functions.source import Source
from resfuse.kernels.interface import STREAM, Native, Started, listening

HERE = Path(__file__).parent
MODULE = pytest.mark.skipif(_native.module() is None, reason="module_missing: resfuse._C was not built")


class Record(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.c_void_p), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint), ("stream", ctypes.c_uint64), ("words", ctypes.c_uint64 * 8),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> str:
    if shutil.which("c++") is None:
        pytest.skip("compiler_missing: compiles what stands for the driver")
    path = str(tmp_path_factory.mktemp("driver") / "libcuda_double.so")
    command = ["c++", "-std=c++17", "-shared", "-fPIC", "-fvisibility=default", str(HERE / "launch_driver.cpp")]
    subprocess.run([*command, "-o", path], check=True)
    return path


@pytest.fixture
def driver(library):
    """driver.start(parameters): as many are recorded."""
    double = ctypes.CDLL(library)
    double.driver_record.restype = ctypes.POINTER(Record)
    start = lambda parameters, failing=-1: double.driver_start(parameters, failing)  # noqa: E731
    start(0)
    return SimpleNamespace(
        start=start, library=library, double=double, context=double.driver_context,
        records=lambda: [double.driver_record(i).contents for i in range(double.driver_launches())],
    )  # fmt: skip


def launch(*parameters, name="kernel", function=0, grid=(1, 1, 1), threads=32, shared=0, kernel=None) -> tuple:
    return kernel, name, function, grid, threads, shared, list(parameters)


# A batch ---------------------------------------------------------------------------------------------------------


@MODULE
def test_a_batch_makes_its_launches_in_order(driver):
    driver.start(6)
    small = launch(bytes(8), b"\1\0\0\0", struct.pack("<q", -(2**40)), struct.pack("<f", 0.5), (1, 24), (0, 0),
                   grid=(784, 1, 1), threads=128, shared=50_000)  # fmt: skip
    other = launch((0, 2**40), (1, 0), (1, 1), bytes(8), b"\xff", b"", grid=(3, 2, 7))
    batch = _native.module().Batch(0, [small, other], driver.library)
    for stream, bases in ((77, (1000, 2**63)), (2**63 + 1, (2000, 3000))):
        driver.start(6)
        batch(stream, *bases)
        one, two = driver.records()
        assert tuple(one.words[:6]) == (0, 1, 2**64 - 2**40, 0x3F000000, bases[1] + 24, bases[0])
        assert tuple(two.words[:6]) == (bases[0] + 2**40, bases[1], bases[1] + 1, 0, 255, 0)
        assert (*one.grid, *one.block, one.shared, one.stream) == (784, 1, 1, 128, 1, 1, 50_000, stream)
        assert (*two.grid, *two.block, two.shared, two.stream) == (3, 2, 7, 32, 1, 1, 0, stream)


@MODULE
def test_an_error_names_the_kernel_and_ends_the_batch(driver):
    batch = _native.module().Batch(0, [launch(name=name) for name in ("first", "second", "third")], driver.library)
    driver.start(0, failing=1)
    with pytest.raises(RuntimeError, match="second: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"):
        batch(0)
    assert len(driver.records()) == 1


@MODULE
def test_a_thread_without_a_context_gets_the_devices_own(driver):
    batch = _native.module().Batch(3, [launch()], driver.library)
    found = []
    thread = threading.Thread(target=lambda: (batch(0), found.append(driver.context())))
    thread.start()
    thread.join()
    assert found == [103] and len(driver.records()) == 1


@MODULE
def test_threads_run_a_batch_at_the_same_time(driver):
    """A launch that waits for the device keeps no other thread from Python, and each thread has its own addresses."""
    gate = ctypes.cast(driver.double.gate, ctypes.c_void_p).value
    batch = _native.module().Batch(0, [launch((i, 0), function=gate) for i in range(2)], driver.library)
    waiting, mine = (ctypes.c_int * 2)(0, 1), (ctypes.c_int * 2)(1, 1)
    thread = threading.Thread(target=batch, args=(0, ctypes.addressof(waiting), ctypes.addressof(waiting) + 4))
    thread.start()
    while thread.is_alive() and not driver.records():
        pass
    batch(0, ctypes.addressof(mine), ctypes.addressof(mine) + 4)
    waiting[0] = 1
    thread.join()
    assert [*waiting, *mine] == [2, 2, 2, 2]


@MODULE
def test_what_cannot_be_launched_is_said_at_once(driver):
    make = _native.module().Batch
    with pytest.raises(RuntimeError, match="absent.so"):
        make(0, [], "/absent.so")
    with pytest.raises(ValueError, match="8 bytes"):
        make(0, [launch(bytes(9))], driver.library)
    batch = make(0, [launch((1, 0))], driver.library)
    for wrong in ((), (1,), (1, 2, 3), (1, "2"), (1, -2)):
        with pytest.raises((TypeError, OverflowError)):
            batch(0, *wrong)
    assert not driver.records()


@MODULE
def test_a_batch_keeps_its_kernels(driver):
    kernel = Kernels(driver, False)
    held = weakref.ref(kernel)
    batch = _native.module().Batch(0, [launch(kernel=kernel)], driver.library)
    del kernel
    gc.collect()
    assert held() is not None
    del batch
    gc.collect()
    assert held() is None


# Steps -----------------------------------------------------------------------------------------------------------


class Kernels:
    """The double's kernels as a step starts them. singly: those that cannot be in a batch, by their number."""

    def __init__(self, driver, batches: bool, singly=()):
        self.driver, self.batches, self.singly = driver, batches, singly
        self.function = ctypes.cast(driver.double.axpy, ctypes.c_void_p).value
        self.started, self.sizes = 0, []

    def axpy(self, out, a, b, factor: float) -> None:
        """out = factor * a + b."""
        if listening.started is None:
            self._run(out.numel(), *(t if t is None else t.data_ptr() for t in (out, a, b)), factor)
        else:
            listening.started(lambda: self._start(out, a, b, factor))

    def _start(self, out, a, b, factor) -> Started:
        self._run(out.numel(), *(t if t is None else t.data_ptr() for t in (out, a, b)), factor)
        native, alone = None, self.started in self.singly
        self.started += 1
        if self.batches and not alone:
            parameters = (out, a, bytes(8) if b is None else b, struct.pack("<f", factor), bytes(8))
            native = Native(self._batch, (None, "axpy", self.function, (out.numel(), 1, 1), 32, 0), parameters)
        again = lambda n, stream, *operands: self._run(n, *operands)  # noqa: E731
        return Started(again, (out.numel(), STREAM), (out, a, b, factor), True, native)

    def _batch(self, launches):
        self.sizes.append(len(launches))
        return _native.module().Batch(0, launches, self.driver.library)

    def _run(self, n: int, out: int, a: int, b: int | None, factor: float) -> None:
        values = ctypes.c_void_p(out), ctypes.c_void_p(a), ctypes.c_void_p(b), ctypes.c_float(factor)
        parameters = (ctypes.c_void_p * 4)(*(ctypes.addressof(v) for v in values))
        self.driver.double.axpy((ctypes.c_uint * 3)(n, 1, 1), parameters)


def body(text: str) -> str:
    """What a step does, one letter a line: Batch, launch alone, Allocation, Operator, Deletion."""
    kinds = {r"del ": "D", r"c\d+\(stream": "B", r"c\d+\(\d": "l", r"v\S+ = c\d+\(\(\d+": "A", r"[v_].* = c": "O"}
    lines = [line.strip() for line in text.splitlines()[1:] if "data_ptr()" not in line and "scratch" not in line]
    return "".join(next((k for p, k in kinds.items() if re.match(p, line)), "") for line in lines)


def noted(call, *operands) -> tuple[Source, object]:
    with Notes(operands) as notes:
        result = call(*operands)
    return Source(*notes.kept(result), notes.count, notes.operands), result


@MODULE
def test_launches_between_operators_are_one_batch(driver):
    k = Kernels(driver, True)

    def call(x):
        a, b = torch.empty_like(x), torch.empty_like(x)
        k.axpy(a, x, None, 2.0)
        out = torch.empty_like(x)  # small, and may be there before
        k.axpy(b, a, x, 1.0)
        view = out[1:]  # which does nothing on the device
        k.axpy(out, b, a, 3.0)
        total = out + 1
        k.axpy(out, total, None, -1.0)
        return out, view, total

    made, result = noted(call, torch.arange(5.0))
    text = made.text()
    assert k.sizes == [3, 1] and body(text).replace("D", "") == "AOBOB", text
    x = torch.randn(5)
    driver.start(0)
    assert all(map(torch.equal, made.function()(0, x), call(x)))
    assert driver.double.driver_launches() == 4


@MODULE
def test_what_cannot_be_in_a_batch_is_started_in_its_place(driver):
    k = Kernels(driver, True, singly=(1, 2))

    def call(x):
        out = torch.empty_like(x)
        for i in range(5):
            k.axpy(out, out if i else x, x, float(i + 1))
        return out

    made, _ = noted(call, torch.arange(5.0))
    assert body(made.text()) == "ABllB" and k.sizes == [1, 2]
    x = torch.randn(5)
    driver.start(0)
    assert torch.equal(made.function()(0, x), call(x))


@MODULE
def test_a_large_tensor_is_freed_before_the_next_is_allocated(driver, monkeypatch):
    """And while nothing large waits to be freed, allocations come early."""
    monkeypatch.setattr(source, "SMALL", 64)
    monkeypatch.setattr(source, "SCRATCH", 64)
    k = Kernels(driver, True)

    def call(x):
        first = torch.empty_like(x)
        k.axpy(first, x, None, 1.0)
        second, little = torch.empty_like(x), x.new_empty(4)
        k.axpy(second, first, x, 2.0)
        k.axpy(little, second[:4], None, 2.0)
        third = torch.empty_like(x)  # first is read no more, and its memory is this one's
        k.axpy(third, second, x, 3.0)
        return third, little

    made, _ = noted(call, torch.arange(100.0))
    text = made.text()
    assert body(text) == "AAABDABD", text
    assert k.sizes == [3, 1]
    x = torch.randn(100)
    driver.start(0)
    assert all(map(torch.equal, made.function()(0, x), call(x)))


@MODULE
def test_kernels_read_the_one_cast_of_a_weight(driver):
    k = Kernels(driver, True)

    def call(weight):
        outs = [torch.empty(6), torch.empty(6)]
        for factor, out in enumerate(outs, 1):
            k.axpy(out, weight.to(torch.float32), None, float(factor))
        return outs

    made, _ = noted(call, torch.randn(2, 3, dtype=torch.float64))
    assert body(made.text()) == "AAOBD"
    weight = torch.randn(2, 3, dtype=torch.float64)
    assert all(map(torch.equal, made.function()(0, weight), call(weight)))


@pytest.mark.parametrize("batches", [False, pytest.param(True, marks=MODULE)])
def test_scratch_memory_is_shared_by_what_does_not_live_together(driver, batches):
    k = Kernels(driver, batches)

    def call(x):
        parts = [x]
        for i in range(8):
            parts.append(torch.empty_like(x))
            k.axpy(parts[-1], parts[-2], x, float(i))
        out = x.new_empty(500)
        k.axpy(out, parts[-1][500:], None, 1.0)
        return out

    made, _ = noted(call, torch.arange(1000.0))
    assert len(made.scratch) == 8 and made.scratch_bytes == 4096 + 4000  # two at a time, the second aligned
    x = torch.randn(1000)
    assert torch.equal(made.function()(0, x), call(x))


STEPS = st.lists(
    st.tuples(st.sampled_from(["axpy", "axpy", "axpy", "add", "view", "write", "large"]), *4 * [st.integers(0, 50)]),
    min_size=1, max_size=25,
)  # fmt: skip


@MODULE
@settings(max_examples=150, deadline=None)
@given(program=STEPS, batches=st.booleans(), singly=st.sets(st.integers(0, 20), max_size=5), limit=st.integers(0, 99))
def test_any_step_gives_the_same_bits(library, program, batches, singly, limit):
    """Random programs of kernels, operators, views and writes, of small and large tensors."""
    double = ctypes.CDLL(library)
    double.driver_start(0, -1)
    k = Kernels(SimpleNamespace(double=double, library=library), batches, singly)

    def call(x, y):
        def made(tensors):  # what may be written to
            given = {t.untyped_storage().data_ptr() for t in (x, y)}
            return [t for t in tensors if t.untyped_storage().data_ptr() not in given]

        tensors = [x, y]
        for i, (what, *numbers) in enumerate(program):
            a, b = (tensors[n % len(tensors)] for n in numbers[:2])
            n = min(a.numel(), b.numel())
            a, b = a[:n], b[:n]  # views
            if what == "axpy":
                mine = [t for t in made(tensors) if t.numel() == n]
                out = mine[numbers[2] % len(mine)] if mine and numbers[3] % 3 == 0 else x.new_empty(n)
                k.axpy(out, a, None if numbers[3] % 4 == 1 else b, 0.25 * (i % 5))
                tensors.append(out)
            elif what == "add":
                tensors.append(torch.add(a, b))
            elif what == "write":
                for t in made(tensors)[numbers[2] % 3 :][:1]:
                    t.mul_(2)
            elif what == "view":
                tensors.append(a[n // 2 :])
            elif what == "large":
                out = x.new_empty(2 * n)
                k.axpy(out, torch.cat([a, b]), None, 0.5)
                tensors.append(out)
            if len(tensors) > 6:
                del tensors[2 + numbers[0] % 3]
        return tensors[2:]

    x, y = torch.randn(12), torch.randn(9)
    limits = source.SMALL, source.SCRATCH
    source.SMALL, source.SCRATCH = limit, 2 * limit
    try:
        again = noted(call, x, y)[0].function()
    finally:
        source.SMALL, source.SCRATCH = limits
    for _ in range(2):
        x, y = torch.randn(12), torch.randn(9)
        expected = call(x, y)
        before = x.clone(), y.clone()
        found = again(0, x, y)
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))
        assert torch.equal(before[0], x) and torch.equal(before[1], y)
