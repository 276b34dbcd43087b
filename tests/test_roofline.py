"""The roofline's counts are those of the tensors that a step reads and writes."""

import json
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import resfuse
from resfuse.bench import command, roofline
from resfuse.kernels import dispatch
from resfuse.kernels.interface import BNGrad, Masked, Norm, Second, Sum, Want
from resfuse.testing.cases import CASES, make_block
from resfuse.testing.roofline.ceilings import SHEETS, measured
from resfuse.testing.roofline.fusion import pointwise_fused
from resfuse.testing.roofline.recording import BACKWARD, FORWARD, Block, Op, Recorder, record
from resfuse.testing.roofline.work import total, works

ROOT = Path(__file__).parents[1]
BF16 = torch.bfloat16


class Row(torch.nn.Module):
    """Blocks of a case in a row, so that they have names and neighbours."""

    def __init__(self, name, count):
        super().__init__()
        self.blocks = torch.nn.Sequential(*(make_block(CASES[name]) for _ in range(count)))

    def forward(self, x):
        return self.blocks(x)


def recorded(name, batch, *, fused, dtype=BF16, gpu=True, count=1):
    case = replace(CASES[name], batch=batch)
    return record(partial(Row, name, count), case.input_shape, dtype, fused=fused, gpu=gpu)


def units(found, batch, phase, case="stage1", block="blocks.1"):
    """Bytes of a block in tensors of its width."""
    unit = replace(CASES[case], batch=batch).unit_bytes(2)
    return sum(work.bytes for work in found if work.block == Block(block, phase)) / unit


def test_a_bottleneck_moves_what_counting_by_hand_gives():
    """Eager: 54 tensors of the width forward and 84 backward; with pointwise fusion 34 and 70 (docs/roofline.md)."""
    eager = recorded("stage1", 256, fused=False, count=3)
    for phase, by_op, by_fusion in ((FORWARD, 54, 34), (BACKWARD, 84, 70)):
        assert units(works(eager), 256, phase) == pytest.approx(by_op, rel=2e-3)
        assert units(pointwise_fused(eager.ops), 256, phase) == pytest.approx(by_fusion, rel=2e-3)


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_launches_are_those_that_were_compiled(name):
    """benchmarks/results/triton-compiled.json has every launch of a step that ran with memory, and its bytes."""
    results = json.loads((ROOT / "benchmarks" / "results" / "triton-compiled.json").read_text())
    (traffic,) = (row for row in results["traffic"] if row["case"] == name)
    theirs = Counter((launch.lstrip("_"), moved) for launch, moved in traffic["launches"])
    names = {launch for launch, _ in theirs}
    ops = [op for op in recorded(name, traffic["batch"], fused=True, count=3).ops if op.block.name == "blocks.1"]
    ours = Counter((op.name, sum(op.reads.values()) + sum(op.writes.values())) for op in ops if op.name in names)
    assert ours == theirs and len(theirs) > 15


class Seen(TorchDispatchMode):
    """(operator, bytes of its tensors and of the results that are new), from tensors with values."""

    NAMES = ("convolution", "convolution_backward", "native_batch_norm", "native_batch_norm_backward", "relu_", "add_",
             "threshold_backward", "add")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        name = op._overloadpacket.__name__
        if name in self.NAMES:
            operands = {id(t): t for t in args if isinstance(t, torch.Tensor)}
            results = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]
            written = sum(t.nbytes for t in results)  # in place too: the operand is read and written
            self.found.append((name, sum(t.nbytes for t in operands.values()) + written))
        return result


@pytest.mark.parametrize("dtype", [None, BF16], ids=str)
def test_eager_operators_are_those_that_run(dtype):
    case = CASES["small-projection"]
    model, seen = Row(case.name, 1).to(memory_format=torch.channels_last), Seen()
    x = torch.randn(case.input_shape).contiguous(memory_format=torch.channels_last)
    with seen:
        with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
            out = model(x)
        out.backward(torch.ones_like(out))
    ops = record(partial(Row, case.name, 1), case.input_shape, dtype, fused=False).ops
    counted = [(op.name, sum(op.reads.values()) + sum(op.writes.values())) for op in ops if op.name in Seen.NAMES]
    assert [name for name, _ in counted] == [name for name, _ in seen.found] and len(counted) > 15
    for (name, ours), (_, theirs) in zip(counted, seen.found, strict=True):
        # Fakes give a BatchNorm's saved vectors the dtype of its input.
        assert ours == pytest.approx(theirs, rel=5e-3) if "batch_norm" in name else ours == theirs, name


def tensors(value):
    """Views in operands and results; a recipe that has been written out is read so."""
    if isinstance(value, torch.Tensor):
        return {(value.untyped_storage()._cdata, value.storage_offset(), value.shape): value}
    if isinstance(value, Norm) and value.y is not None:
        return tensors(value.y)
    parts = value if isinstance(value, (tuple, list)) else ()
    return {key: t for part in parts for key, t in tensors(part).items()}


READ_WHOLE = ("conv_stats", "bn_stats", "covariance", "expand", "expand_stats", "expand_products", "finalize",
              "select", "bn_dgrad", "apply")  # fmt: skip


@pytest.mark.parametrize("name", ["small-projection", "basic-stage4", "small-preact"])
def test_primitives_read_their_operands_and_write_their_results(name):
    """Of a step of the CPU's kernels on values, seen at the dispatcher alone, against the count on fakes."""
    case, found = replace(CASES[name], batch=2), []

    @contextmanager
    def within(primitive, operands):
        results = []
        yield results.append
        found.append((primitive, sum(t.nbytes for t in tensors((*operands, results[0])).values())))

    model = resfuse.fuse(Row(name, 1)).to(memory_format=torch.channels_last)
    x = torch.randn(case.input_shape).contiguous(memory_format=torch.channels_last)
    with dispatch.watched(within):
        out = model(x)
        out.backward(torch.ones_like(out))
    counted = record(partial(Row, name, 1), case.input_shape, None, fused=True, gpu=False)
    assert [call.primitive for call in counted.calls] == [primitive for primitive, _ in found]
    ours = {index: work for index, work in enumerate_calls(counted)}
    compared = 0
    for index, (primitive, whole) in enumerate(found):
        if index in ours and primitive in READ_WHOLE:
            assert ours[index].least == whole, primitive
            compared += 1
    assert compared >= 5


def enumerate_calls(recorder):
    """(number of the primitive's call, its work)."""
    calls = list(dict.fromkeys(op.call for op in recorder.ops if op.call is not None))
    return zip(calls, (w for w in works(recorder) if w.name in dispatch.PRIMITIVES), strict=True)


def test_the_cuda_sets_bytes_are_those_that_the_emulator_counts():
    from resfuse.testing.cuda import emulated
    from resfuse.testing.emulator import unavailable

    if unavailable():
        pytest.skip(unavailable())
    from resfuse.kernels.cuda import apply, bn_dgrad, bn_reduce, bn_stats, select

    generator = torch.Generator().manual_seed(0)

    def image():
        return torch.randn(3, 5, 7, 64, generator=generator).permute(0, 3, 1, 2)

    z, dout, residual, vector = image(), image(), image(), torch.rand(64, generator=generator)
    mask = torch.randint(0, 256, (105, 8), generator=generator, dtype=torch.uint8)
    g = Masked(dout, mask)
    calls = {
        "bn_stats": (lambda: bn_stats.bn_stats(z), (z,)),
        "apply": (lambda: apply.apply(Norm(z, vector, vector), Sum(residual), Want(mask=True)), (z, residual)),
        "bn_dgrad": (lambda: bn_dgrad.bn_dgrad(BNGrad(g, z, *5 * (vector,))), (z, dout, mask)),
        "select": (lambda: select.select(g), (dout, mask)),
        "bn_reduce": (lambda: bn_reduce.bn_reduce(g, z, vector, vector), (z, dout, mask)),
    }
    least = mask.nbytes  # anything smaller is a vector
    with emulated() as library:
        for name, (call, operands) in calls.items():
            recorder = Recorder()
            with recorder:
                results = [t for t in flat(call()) if t.nbytes >= least]
            seen = sum(map(library.traffic, operands)) + sum(library.traffic(t, written=True) for t in results)
            counted = [size for op in recorder.ops for sizes in (op.reads, op.writes) for size in sizes.values()]
            assert sum(size for size in counted if size >= least) == seen > 0, name


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [t for part in value or () for t in flat(part)]


@pytest.mark.parametrize("name", ["stage1", "stage4", "small-projection", "basic-stage4", "small-preact"])
def test_operations_are_those_of_the_flop_counter(name):
    case = replace(CASES[name], batch=2)
    recorder = record(partial(Row, name, 1), case.input_shape, None, fused=True, gpu=False)
    model = resfuse.fuse(Row(name, 1)).to(memory_format=torch.channels_last)
    x = torch.randn(case.input_shape).contiguous(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:
        out = model(x)
        out.backward(torch.ones_like(out))
    operations = sum(call.operations for call in recorder.calls)
    assert operations == counter.get_total_flops() > 0


def test_a_second_product_counts():
    from resfuse.testing.roofline.operations import primitive_operations

    x, weight, vector = torch.empty(2, 8, 3, 3), torch.empty(16, 8), torch.empty(16)
    plain, second = (x, weight, vector, vector, Sum(), Want()), Sum(Second(x, weight, vector, vector))
    assert primitive_operations("expand", plain, None) == 2 * 18 * 16 * 8
    assert primitive_operations("expand", (*plain[:4], second, Want()), None) == 4 * 18 * 16 * 8


def op(name, reads, writes, phase=FORWARD):
    return Op(name, Block("b", phase), reads, writes, frozenset(), 0, None)


def test_pointwise_results_are_written_once_or_made_again_whichever_moves_less():
    chain = [op("relu", {0: 8}, {1: 8}), op("mul", {1: 8}, {2: 8}), op("convolution", {2: 8}, {3: 8})]
    assert [work.bytes for work in pointwise_fused(chain)] == [16, 16]  # 0 -> 2 at once, then the vendor's
    # Read by two kernels: made again from one tensor, written by the first of its readers if made of three.
    ends = [op("native_batch_norm", {1: 8}, {5: 8, 6: 1}), op("convolution", {5: 8}, {7: 8})]
    once = pointwise_fused([op("relu", {0: 8}, {1: 8}), *ends])
    assert [work.bytes for work in once] == [8 + 1, 8 + 1 + 8, 16]
    many = pointwise_fused([op("add", {0: 8, 8: 8, 9: 8}, {1: 8}), *ends])
    assert [work.bytes for work in many] == [24 + 8 + 1, 8 + 1 + 8, 16]
    # What the other phase reads is written.
    later = [op("relu", {0: 8}, {1: 8}), op("mul", {1: 8}, {2: 8}, BACKWARD)]
    assert sum(work.bytes for work in pointwise_fused(later)) == 32


def test_floors_are_the_larger_of_the_two_ceilings_work_by_work():
    recorder = recorded("stage4", 256, fused=True)
    sheet = SHEETS["h200"]
    found = works(recorder)
    times = [max(work.bytes / 4.8e12, work.operations / 989e12) for work in found]
    assert total(found, sheet, "bfloat16").floor_ms == pytest.approx(1e3 * sum(times))
    assert {work.operations / 989e12 > work.bytes / 4.8e12 for work in found} == {True, False}
    with pytest.raises(ValueError, match="no rate of float64"):
        sheet.seconds(1, 1, "float64")


def test_measured_ceilings_come_from_a_results_file():
    path = ROOT / "benchmarks" / "results" / "h100.json"
    results, found = json.loads(path.read_text()), measured(path)
    assert found.bandwidth == 1e12 * results["copy"]["tb_s"] and "float32" not in found.rates
    assert found.rates["bfloat16"] == 1e12 * results["matmul_bfloat16"]["tflop_s"]
    with pytest.raises(ValueError, match="no ceilings"):
        measured(ROOT / "benchmarks" / "results" / "memory.json")


def test_the_command_writes_results_and_a_figure(tmp_path, capsys):
    json_path, png = tmp_path / "r.json", tmp_path / "r.png"
    options = ["--model", "resnet18", "--batch", "8", "--pixels", "64", "--dtype", "fp32", "--device", "a100"]
    assert command.main(["roofline", *options, "--json", str(json_path), "--png", str(png)]) == 0
    content, printed = json.loads(json_path.read_text()), capsys.readouterr().out
    assert png.stat().st_size > 10_000 and "data sheet of the A100" in printed
    assert list(content["blocks"]["eager"])[1:9] == [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    for name, whole in content["totals"].items():
        for parts in (content["blocks"][name], content["phases"][name], content["kernels"][name]):
            assert sum(t["gigabytes"] for t in parts.values()) == pytest.approx(whole["gigabytes"], abs=1e-4)
    floors = [content["totals"][name]["floor_ms"] for name in (roofline.EAGER, roofline.FUSED)]
    assert floors[0] > floors[1] > 0 and set(content["blocks"]["eager"]) == set(content["blocks"]["resfuse"])


def test_an_unknown_model_is_named():
    with pytest.raises(SystemExit, match="no_such_net"):
        roofline.builder("no_such_net")
