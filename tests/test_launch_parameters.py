"""Launches of Triton's kernels as a driver takes them: the parameters that its own launchers give, and a GPU's bits."""

import re
import struct
import threading
from types import SimpleNamespace

import pytest
import torch
from units import TRITON

import resfuse
from resfuse import _native
from resfuse.kernels import dispatch
from resfuse.testing.cases import CASES, make_block, make_gradient, make_input


@pytest.fixture(scope="module")
def launched():
    """Launches of training steps, compiled for a GPU that is not there: (compiled kernel, operands) of each kind."""
    from resfuse.testing.triton import offline
    from resfuse.testing.triton.steps import compile_steps

    found = {}

    class Noting(offline.Compiler):
        def __call__(self, kernel, programs, args, options):
            compiled = kernel.warmup(*map(offline._meta, args), grid=(1,), **options)
            operands = (*args, *(options[name] for name in kernel.arg_names[len(args) :]))
            found[compiled.hash] = compiled, operands

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline, "Compiler", Noting)
        compile_steps(90, torch.bfloat16, ("small-projection", "small-strided", "small-padded", "small-stem"))
        compile_steps(90, torch.float32, ("small-scaled",), windows=True)
    return list(found.values())


@TRITON
def test_parameters_are_those_of_tritons_own_launcher(launched):
    """The source of which it generates for each signature, and the kernel's own, in its assembly."""
    from triton.backends.nvidia.driver import make_launcher

    from resfuse.kernels.triton import _launch

    if not _launch.RUNS_COMPILED:
        pytest.skip("triton_version: another's launchers are not asked to do what these do")
    assert len({compiled.name for compiled, _ in launched}) > 20
    seen = set()
    for compiled, operands in launched:
        text = make_launcher(compiled.src.constants, dict(compiled.src.signature), None)
        types = dict(reversed(d.split()) for d in re.search(r"profile_scratch, (.*)\) {", text)[1].split(", "))
        names = re.search(r"void \*params\[\] = { (.*) };", text)[1].replace("&", "").split(", ")
        assert names[-2:] == ["global_scratch", "profile_scratch"]
        values = list(flat(operands))
        assert len(values) == len(list(flat(tuple(compiled.src.signature.values()))))
        given = _launch.parameters(compiled, operands)
        expected = [stored(types[name], values[int(name.removeprefix("arg"))]) for name in names[:-2]]
        assert len(given) == len(expected) + 2 and given[-2:] == (bytes(8), bytes(8))
        for mine, its in zip(given, expected, strict=False):
            assert mine is its if isinstance(its, torch.Tensor) else mine == its, compiled.name
        entry = re.search(r"\.entry .*?\((.*?)\)\n", compiled.asm["ptx"], re.S)[1]
        sizes = [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z]+(\d+)", entry)]
        assert sizes == [len(p) if isinstance(p, bytes) else 8 for p in given], compiled.name
        seen |= set(types.values())
    assert seen == {"CUdeviceptr", "int32_t", "uint32_t"}, "pointers, integers and floats"


def flat(given):
    for each in given:
        yield from flat(each) if isinstance(each, tuple) else [each]


def stored(kind: str, value):
    """A value as C has it in a variable of that type."""
    if kind == "CUdeviceptr":
        assert isinstance(value, torch.Tensor)
        return value
    if isinstance(value, float):
        return struct.pack({"uint32_t": "<f", "uint64_t": "<d"}[kind], value)
    return value.to_bytes(int(re.search(r"\d+", kind)[0]) // 8, "little", signed=kind.startswith("int"))


@TRITON
def test_what_more_a_launch_may_take_keeps_it_out_of_batches(launched, monkeypatch):
    from resfuse.kernels.triton import _launch

    compiled, operands = launched[0]
    monkeypatch.setattr(_native, "module", lambda: SimpleNamespace(Batch=list))

    def described(programs=5, source=compiled.src, **changes):
        fields = {"global_scratch_size": 0, "profile_scratch_size": 0, **compiled.metadata._asdict(), **changes}
        like = SimpleNamespace(src=source, name="it", function=99, metadata=SimpleNamespace(**fields))
        return _launch._described(like, programs, 1, operands)

    found = described(num_warps=8, shared=1234)
    assert found.launch[1:] == ("it", 99, (5, 1, 1), 256, 1234) and found.batch.args == (1,)
    for more in ("num_ctas", "global_scratch_size", "profile_scratch_size"):
        assert described(**{more: 2}) is None
    for more in ("launch_cooperative_grid", "launch_pdl"):
        assert described(**{more: True}) is None
    assert described(programs=0) is None
    descriptor = {name: "tensordesc<fp16[16, 16]>" for name in compiled.src.signature}
    assert described(source=SimpleNamespace(signature=descriptor)) is None
    monkeypatch.setattr(_native, "module", lambda: None)
    assert described() is None


@TRITON
@pytest.mark.gpu
@pytest.mark.skipif(_native.module() is None, reason="module_missing: resfuse._C was not built")
def test_on_a_gpu_batches_do_what_single_launches_do(monkeypatch, deterministic):
    """In a thread of its own too, which has no context when autograd begins there."""
    case, found = CASES["small-projection"], []
    x, dout = make_input(case, device="cuda"), make_gradient(case, device="cuda")
    for batches in (False, True):
        with monkeypatch.context() as patch:
            if not batches:
                patch.setattr(_native, "module", lambda: None)
            dispatch.kernels.cache_clear()
            block = resfuse.fuse(make_block(case, device="cuda"), config=resfuse.FuseConfig(backend="triton"))

            def step(block=block):
                block.zero_grad()
                leaf = x.detach().requires_grad_()
                out = block(leaf)
                out.backward(dout)
                found.append([out.detach(), leaf.grad, *(p.grad for p in block.parameters()), *block.buffers()])

            for _ in range(3):
                step()
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()
            steps = dispatch.kernels("triton", "cuda", x.dtype).replays.values()
            held = [any(type(v).__name__ == "Batch" for v in each.__globals__.values()) for each in steps]
            assert held == [batches] * 3
    torch.cuda.synchronize()
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        assert all(map(torch.equal, one, other))
