"""Baselines and resfuse on one GPU, part by part: python benchmarks/gpu.py --out FOLDER --parts env,ceilings,...

Every part runs in a process of its own with a time limit, and writes FOLDER/<part>.json as it goes, so that a run that
is cut off leaves what it had. The tables come last. `--device cpu --smoke` runs every line with tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import primitives as primitive_rows
from resfuse.bench import tables
from resfuse.bench.implementations import (
    AUTOTUNE,
    COMPILE,
    EAGER,
    IMPLEMENTATIONS,
    RESFUSE,
    Implementation,
    kernel_sets,
)
from resfuse.bench.plan import Job, Plan
from resfuse.bench.results import Results, write_json
from resfuse.bench.run import run
from resfuse.testing.cases import PROJECTIONS, STAGES, BottleneckCase
from resfuse.testing.comparison import MODES
from resfuse.testing.environment import environment
from resfuse.testing.timing import interleave, summary

ROOT = Path(__file__).parents[1]
LIMITS = {  # seconds
    "env": 30, "ceilings": 40, "tests": 300, "primitives": 150, "steps": 200, "blocks": 180, "resnet50": 180,
    "evaluation": 240, "sanitize": 300, "autotune": 560,
}  # fmt: skip
DEFAULT = "env,ceilings,tests,primitives,steps,blocks,resnet50,evaluation"
WAYS = "eager,torch.compile,resfuse,lean,leanest,cuda"  # of training, train_step.py's
BATCH, GATE_BATCH = 256, 8
LEFT_OUT = 3  # exit code of a part that cannot run here
PRIMITIVE_ERROR = 0.02  # relative to the eager set, in bfloat16
GPU_MODES = ("autocast-bfloat16", "autocast-float16")
COMPILE_SECONDS = {"block": 6.0, "network": 35.0}  # expected on a machine with a GPU


def main() -> int:
    options = _parser().parse_args()
    parts = options.parts.split(",")
    unknown = [part for part in parts if part not in LIMITS]
    if unknown:
        sys.exit(f"unknown part {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("make gpu needs a GPU: torch.cuda.is_available() is False here.")
    if options.part:
        PARTS[options.part](options)
        return 0
    status = {part: _run_part(part, options) for part in parts}
    write_json(options.out / "status.json", status)
    _show(options.out, status)
    return 0 if all(state == "ok" for state in status.values()) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure on one GPU; see the file's head.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--parts", default=DEFAULT, help=f"of {', '.join(LIMITS)}; default {DEFAULT}")
    known = f"of {', '.join(MODES)}; default {', '.join(GPU_MODES)}"
    parser.add_argument("--modes", default=",".join(GPU_MODES), help=known)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: that it runs, nothing more")
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)
    return parser


def _run_part(part: str, options: argparse.Namespace) -> str:
    arguments = ["--out", str(options.out), "--device", str(options.device), "--part", part, "--modes", options.modes]
    command = [sys.executable, str(Path(__file__)), *arguments, *(["--smoke"] if options.smoke else [])]
    print(f"{part} (at most {LIMITS[part]} s)", flush=True)
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(LIMITS[part])
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what the part has started too: it would disturb the next
        process.wait()
        return f"stopped after {LIMITS[part]} s"
    return {0: "ok", LEFT_OUT: "left out"}.get(code, f"exit code {code}")


def env(options: argparse.Namespace) -> None:
    """Versions, device and build facts."""
    from resfuse import _native

    write_json(options.out / "env.json", {**environment(options.device), "native": _native.build_facts()})


def ceilings(options: argparse.Namespace) -> None:
    """What the device reaches: a copy that no cache holds, and square matrix products, on random data."""
    size = 2**18 if options.smoke else 2**30
    side = 64 if options.smoke else 8192
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    rounds = {"budget": 5.0, "maximum": 50, "warmup": 3, "device": options.device, "host": False}
    seconds = summary(interleave({"copy": lambda: target.copy_(source)}, **rounds)["copy"])
    found = {"copy": {"bytes_read_and_written": 2 * size, **seconds._asdict(), "tb_s": 2e-12 * size / seconds.median}}
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(side, side, device=options.device).to(dtype) for _ in range(2))
        seconds = summary(interleave({"matmul": lambda a=a, b=b: a @ b}, **rounds)["matmul"])
        name = str(dtype).removeprefix("torch.")
        found[f"matmul_{name}"] = {"side": side, **seconds._asdict(), "tflop_s": 2e-12 * side**3 / seconds.median}
    write_json(options.out / "ceilings.json", {"environment": environment(options.device), **found})


def tests(options: argparse.Namespace) -> None:
    """The tests marked gpu that are not slow (on a CPU the smoke run only collects them), a process to a core: most of
    their time is Triton's compiler."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests")]
    if options.device.type != "cuda":
        command += ["--collect-only"]
    elif importlib.util.find_spec("xdist"):
        command += ["-n", str(min(14, os.cpu_count() or 1))]
    code, lines = _logged(command, options.out / "tests.txt")
    print("\n".join(lines[-30:]), flush=True)
    write_json(options.out / "tests.json", {"exit_code": code, "last": lines[-60:]})
    sys.exit(code)


def _logged(command: list[str], log: Path, **environment: str) -> tuple[int, list[str]]:
    """Exit code and lines of a command, which a file has as they come."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        code = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        ).returncode
    return code, log.read_text().strip().splitlines()


def blocks(options: argparse.Namespace) -> None:
    """Stages 1 to 4 and their projections."""
    names = ("small-identity",) if options.smoke else [case.name for case in (*STAGES, *PROJECTIONS)]
    _measure("blocks", names, [EAGER.name, COMPILE.name], COMPILE_SECONDS["block"], 2.0, options)


def primitives(options: argparse.Namespace) -> None:
    """Each primitive of each kernel set, beside a copy and a matrix product of the same run."""
    rows, path = [], options.out / "primitives.json"
    cases = [BottleneckCase("tiny", 32, 8, 32, 8)] if options.smoke else STAGES
    size, side, batch, seconds = (2**18, 64, 2, 0.05) if options.smoke else (2**30, 8192, BATCH, 0.4)
    for case in cases:
        rows += primitive_rows.measure(
            replace(case, batch=batch), torch.bfloat16, options.device, seconds, size, side
        )
        facts = {"environment": environment(options.device), "command": _command()}
        write_json(path, {**facts, "rows": rows, "host": []})
    issued = primitive_rows.host(replace(cases[0], batch=8), torch.bfloat16, options.device, 5 if options.smoke else 50)
    write_json(path, {**facts, "rows": rows, "host": issued})
    wrong = [row for row in rows if not row["error"] <= PRIMITIVE_ERROR]
    if wrong:
        sys.exit(f"wrong results: {wrong}")


def steps(options: argparse.Namespace) -> None:
    """ResNet-50's train step in every way, under bf16 autocast."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--out", str(options.out / "steps.json")]
    command += ["--ways", "eager,resfuse,lean" if options.smoke else WAYS, "--device", str(options.device)]
    command += shlex.split("--model resnet18 --batch 2 --side 32 --rounds 1") if options.smoke else []
    sys.exit(subprocess.run(command, cwd=ROOT, check=False).returncode)


def sanitize(options: argparse.Namespace) -> None:
    """Tests of the Triton and the CUDA kernels at small shapes under compute-sanitizer's memcheck and racecheck, those
    of the CUDA kernels under its synccheck too. Not initcheck: the tests fill memory with NaN, so to it all is written,
    and what reads a value that no kernel wrote fails its comparison."""
    tool, status = shutil.which("compute-sanitizer"), {}
    if tool is None:
        write_json(options.out / "sanitize.json", {"left_out": "sanitizer_missing: compute-sanitizer is not on PATH"})
        sys.exit(LEFT_OUT)
    triton = [str(ROOT / "tests" / "test_triton.py"), "-m", "gpu", "-k", "small-strided and not float16"]
    # Of the four shapes (3, 16, 4, 4), which is read 16 bytes at a time, and (1, 65, 9, 7), which is not.
    few = "(4 or 65 or pools or finalize or running or bn_backward) and not conv_stats"
    compiled = [str(ROOT / "tests" / "test_kernels.py"), "-m", "gpu"]
    compiled += ["-k", f"cuda and (float32 or bfloat16) and {few}"]
    checks = [(name, tests) for name in ("memcheck", "racecheck") for tests in (triton, compiled)]
    for check, chosen in (*checks, ("synccheck", compiled)):
        of = "triton" if chosen is triton else "cuda"
        command = [tool, "--tool", check, "--error-exitcode", "9", "--target-processes", "all", sys.executable]
        command += ["-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
        # Without torch's cache every tensor is an allocation, whose end memcheck knows.
        code, lines = _logged(command, options.out / f"{check}-{of}.txt", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        status[f"{check}, {of}"] = {"exit_code": code, "last": lines[-20:]}
        write_json(options.out / "sanitize.json", status)
    sys.exit(max(each["exit_code"] for each in status.values()))


def resnet50(options: argparse.Namespace) -> None:
    """The whole network on photographs."""
    names = ("small-resnet",) if options.smoke else ("resnet50",)
    _measure("resnet50", names, [EAGER.name, COMPILE.name], COMPILE_SECONDS["network"], 10.0, options)


def evaluation(options: argparse.Namespace) -> None:
    """The whole network in evaluation, at batches from one photograph on."""
    name, batches = ("small-resnet-eval", (1, 4)) if options.smoke else ("resnet50-eval", (1, 32, BATCH))
    _measure("evaluation", (name,), [EAGER.name, COMPILE.name], COMPILE_SECONDS["network"], 4.0, options, batches)


def autotune(options: argparse.Namespace) -> None:
    """torch.compile at its best, whose search takes minutes."""
    names = ("small-identity",) if options.smoke else ("stage1", "resnet50")
    _measure("autotune", names, [EAGER.name, AUTOTUNE.name], 4 * COMPILE_SECONDS["network"], 10.0, options)


def _measure(
    part: str, subjects: Sequence[str], peers: list[str], compile_seconds: float, seconds: float,
    options: argparse.Namespace, batches: Sequence[int] = (),
) -> None:
    """Errors, then memory and time, of the peers and of resfuse with each kernel set; part.json grows job by job."""
    batch, gate_batch, seconds = (4, 4, 0.2) if options.smoke else (BATCH, GATE_BATCH, seconds)
    implementations, jobs = dict(IMPLEMENTATIONS), []
    if options.smoke:
        for name in (COMPILE.name, AUTOTUNE.name):
            implementations[name] = Implementation(name, partial(torch.compile, backend="eager"), compiled=True)
    for mode in options.modes.split(","):
        sets = {each.name: each for each in kernel_sets(options.device, MODES[mode].compute)}
        implementations.update(sets)
        names = (*peers, RESFUSE.name, *sets)
        jobs += [
            Job(subject, mode, size, size, names, seconds, compile_seconds, min(size, gate_batch))
            for subject in subjects for size in batches or (batch,)
        ]  # fmt: skip
    path = options.out / f"{part}.json"

    def written(results: Results) -> None:
        results.write(path)

    plan = Plan(0.9 * LIMITS[part], tuple(jobs), fit_batches=False)
    results = run(
        plan, _command(), options.device, kind=part, implementations=implementations,
        compile_apart=False, progress=_line(), after_job=written,
    )
    results.write(path)
    if not results.gate_passed:
        sys.exit("the correctness gate is red: no speed was measured")


def _command() -> str:
    return shlex.join(["python", *sys.argv])


def _line() -> Callable[[str, float], None]:
    """Progress as lines, each once."""
    seen: set[str] = set()

    def progress(text: str, share: float) -> None:
        text = text.partition(": time, ")[0]  # rounds report their share, too fine for lines
        if text not in seen:
            seen.add(text)
            print(f"  {share:4.0%} {text}", flush=True)

    return progress


def _show(out: Path, status: dict[str, str]) -> None:
    console = Console(width=150)
    for part in ("blocks", "resnet50", "evaluation", "autotune"):
        path = out / f"{part}.json"
        if part in status and path.exists():
            tables.show(json.loads(path.read_text()), console)
    path = out / "primitives.json"
    if "primitives" in status and path.exists():
        found = json.loads(path.read_text())
        primitive_rows.show(found["rows"], found["host"], console)
    path = out / "ceilings.json"
    if "ceilings" in status and path.exists():
        found = json.loads(path.read_text())
        rates = [f"{name} {row['tflop_s']:.3g} TFLOP/s" for name, row in found.items() if "matmul" in name]
        console.print(f"copy {found['copy']['tb_s']:.3g} TB/s, {', '.join(rates)}", highlight=False)
    for part, state in status.items():
        console.print(f"{part}: {state}", highlight=False)


PARTS = {
    each.__name__: each
    for each in (env, ceilings, tests, primitives, steps, blocks, resnet50, evaluation, sanitize, autotune)
}

if __name__ == "__main__":
    sys.exit(main())
