"""Ranges name what runs, cost nothing when nobody profiles, and the commands report them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.modules import module as modules
from torch.profiler import ProfilerActivity, profile

import resfuse
from resfuse import ranges
from resfuse.bench import command
from resfuse.bench import profile as bench
from resfuse.functions import replay
from resfuse.kernels import dispatch
from resfuse.testing.models import small_resnet

ROOT = Path(__file__).parents[1]
BLOCKS = [f"stages.{i}" for i in range(4)]


@pytest.fixture(scope="module")
def model():
    return resfuse.fuse(small_resnet(seed=0))


@pytest.fixture
def nvtx(monkeypatch):
    """NVTX's calls, which need no GPU, as a list: a name, or None for the end of a range."""
    calls = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append(None))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return calls


def step(model):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    out = model(x)
    out.sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def test_nvtx_names_blocks_their_steps_and_primitives(model, nvtx):
    plain = step(model)
    with resfuse.profile_ranges():
        ranged = step(model)
    assert all(torch.equal(a, b) for a, b in zip(plain, ranged, strict=True))
    depth, paths = [], []
    for name in nvtx:
        if name is None:
            depth.pop()
        else:
            depth.append(name)
            paths.append(tuple(depth))
    assert not depth
    for block in BLOCKS:
        assert (block,) in paths and (block, f"{block} block") in paths
        assert (block, f"{block} block", "resfuse.conv_stats") in paths
        assert (block, f"{block} update_running", "resfuse.update_running") in paths
        assert (f"{block} block_backward", "resfuse.conv_backward") in paths
    backward = [path[0] for path in paths if path[0].endswith("block_backward") and len(path) == 1]
    assert [b for b in backward if b.startswith("stages")] == [f"{block} block_backward" for block in BLOCKS[::-1]]


def test_what_is_made_again_has_its_rows_name_and_the_backward_after_it(nvtx):
    rows = resfuse.fuse(small_resnet(seed=0), config=resfuse.FuseConfig(memory="leanest"), input_size=(2, 1, 8, 8))
    with resfuse.profile_ranges(primitives=False):
        step(rows)
    steps = [name.rpartition(" ") for name in nvtx if name is not None and " " in name]
    assert {step for _, _, step in steps} >= {"block", "block_again", "block_first_again", "block_backward"}
    assert [name for name, _, step in steps if step == "block_backward"] == ["stages"] * 4 + ["stem"]
    assert {name for name, _, step in steps if step.endswith("_again")} == {"stages"}


def test_torch_profiler_has_the_same_names(model, nvtx):
    with resfuse.profile_ranges(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        step(model)
    found = [e.key for e in profiler.key_averages() if e.is_user_annotation]
    assert set(found) == {name for name in nvtx if name is not None} and len(found) > 15


def test_ranges_end_where_a_forward_fails(model, nvtx):
    with resfuse.profile_ranges(), pytest.raises(RuntimeError):
        model.stages(torch.randn(2, 5, 8, 8))  # 32 channels are wanted
    assert nvtx == ["0", None]


def test_nothing_is_left_of_ranges_outside(model):
    """Not even a question whether they are wanted: what is called is the kernel set's function itself."""
    k = dispatch.kernels("eager", "cpu", torch.float32)
    hooks = len(modules._global_forward_pre_hooks), len(modules._global_forward_hooks)
    plain, run = k.conv_stats, replay.run
    with resfuse.profile_ranges():
        inside = dispatch.kernels("eager", "cpu", torch.float32).conv_stats
        assert inside is not plain and inside.__wrapped__ is plain and replay.run is not run
    from resfuse.kernels.eager.conv_stats import conv_stats

    assert dispatch.kernels("eager", "cpu", torch.float32).conv_stats is conv_stats is plain and replay.run is run
    assert (len(modules._global_forward_pre_hooks), len(modules._global_forward_hooks)) == hooks


def test_blocks_alone_leave_steps_to_be_replayed(model, nvtx, monkeypatch):
    replayed = []

    def run(k, step, spec, tensors, call, *more):
        replayed.append(step)
        return call()

    monkeypatch.setattr(replay, "run", run)
    with resfuse.profile_ranges(primitives=False):
        step(model)
    assert replayed.count("block") == replayed.count("block_backward") >= 4
    assert not any(name and name.startswith("resfuse.") for name in nvtx) and "stages.0 block" in nvtx
    replayed.clear()
    with resfuse.profile_ranges():
        step(model)
    assert not replayed


def test_descriptions_of_forwards_without_a_backward_do_not_pile_up(model, monkeypatch):
    monkeypatch.setattr(ranges, "MOST", 6)
    with resfuse.profile_ranges() as active:
        for _ in range(3):
            model(torch.randn(2, 1, 8, 8))
            assert 0 < len(active.begun) <= 6
        step(model)


def test_the_environment_switches_them_on(monkeypatch):
    code = (
        "import resfuse, torch; from resfuse.functions import replay; from resfuse.kernels import dispatch;"
        "k = dispatch.kernels('eager', 'cpu', torch.float32);"
        "assert hasattr(k.expand, '__wrapped__') and replay.run.__name__ == '_run'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "RESFUSE_NVTX": "1"})
    begun = []

    class Begun(resfuse.profile_ranges):
        def __enter__(self):
            begun.append(self.primitives)

    monkeypatch.setattr(ranges, "profile_ranges", Begun)
    for value in ("", "0", "1", "blocks"):
        ranges.from_environment(value)
    assert begun == [True, False]
    with pytest.raises(ValueError, match="0, 1 or blocks"):
        ranges.from_environment("yes")


def test_the_command_reports_kernels_ranges_a_trace_and_memory(tmp_path, capsys):
    options = ["--subject", "small-resnet", "--batch", "2", "--steps", "2", "--out", str(tmp_path)]
    assert command.main(["profile", *options]) == 0
    content, printed = json.loads((tmp_path / "profile.json").read_text()), capsys.readouterr().out
    assert "resfuse: its own time" in printed and content["steps"] == 2
    ours = content["implementations"]["resfuse"]
    assert {"resfuse.expand", "stages.0 block", "stages.3 block_backward"} <= {row["name"] for row in ours["ranges"]}
    (expand,) = (row for row in ours["ranges"] if row["name"] == "resfuse.expand")
    assert expand["calls"] == 4 and expand["ms"] > 0
    theirs = content["implementations"]["eager"]
    assert "aten::native_batch_norm" in {row["name"] for row in theirs["kernels"]}
    for name in ("eager", "resfuse"):
        trace = json.loads((tmp_path / f"{name}.trace.json").read_text())
        names = {event.get("name") for event in trace["traceEvents"]}
        assert "step" in names and ("stages.0 block" in names) == (name == "resfuse")
        assert (tmp_path / f"{name}.memory.png").stat().st_size > 5_000
    lines = bench.table(content, "resfuse", "ranges", 3, only="resfuse.")
    assert len(lines) == 5 and all(line.startswith("| `resfuse.") for line in lines[2:])


def test_kernel_names_are_readable():
    for name, expected in {
        "void at::native::elementwise_kernel<128, 4, at::native::add<float>(at::T)::{lambda(int)#1}>(int, float*)":
            "at::native::elementwise_kernel",
        "void (anonymous namespace)::softmax<c10::BFloat16>(float*)": "softmax",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16": "sm90_xmma_fprop_implicit_gemm_bf16bf16",
        "aten::add_": "aten::add_", "_expand": "_expand",
        "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int>(cublasGemvParams)":
            "std::enable_if::type internal::gemvx::kernel",
    }.items():
        assert bench.readable(name) == expected


def test_nsys_records_steady_steps_alone(nvtx, monkeypatch):
    calls, api = nvtx, SimpleNamespace()
    api.cudaProfilerStart, api.cudaProfilerStop = (lambda name=name: calls.append(name) for name in ("START", "STOP"))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: api)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    make = bench.make
    monkeypatch.setattr(bench, "make", lambda subject, mode, batch, device: make(subject, mode, batch, "cpu"))
    bench.capture("small-resnet", "float32", 2, "resfuse", 2, torch.device("cuda"))
    before, window = calls[: calls.index("START")], calls[calls.index("START") + 1 : calls.index("STOP")]
    assert before.count("stages.0 block") == 3 and window.count("stages.0 block") == window.count("step") == 2
    assert window[0] == "step" and window[-1] is None and calls[-1] == "STOP"


def test_without_a_gpu_or_nsys_the_commands_say_so():
    with pytest.raises(SystemExit, match="on a GPU: make profile"):
        command.main(["profile", "--capture", "--device", "cpu"])
    if shutil.which("make") is None or shutil.which("nsys") is not None:
        pytest.skip("no make, or nsys is here")
    done = subprocess.run(
        ["make", "-o", "build", "profile", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "needs nsys on PATH" in done.stderr
