"""Lines 27 to 29: several processes on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from twins import alike

HERE = Path(__file__).parent


def run(folder, *arguments, ranks=2):
    """What each of the processes found."""
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), str(HERE.parent)])
    command = [sys.executable, str(HERE / "workers.py"), str(folder)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), *arguments], env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return [torch.load(folder / f"found{rank}.pt") for rank in range(ranks)]


@pytest.mark.parametrize("name, order, how", [
    ("small-strided", "after", "accumulation"),
    pytest.param("small-strided", "before", "plain", marks=pytest.mark.slow),
    pytest.param("small-preact-bottleneck", "after", "static_graph", marks=pytest.mark.slow),
])  # fmt: skip
def test_27_ddp(name, order, how, tmp_path):
    found = run(tmp_path, "ddp", name, order, how)
    for ours, theirs in found:
        alike(ours, theirs)
    assert all(torch.equal(found[0][0][n], found[1][0][n]) for n in found[0][0]), "ranks differ"


def test_28_fsdp2(tmp_path):
    for ours, theirs in run(tmp_path, "fsdp", "small-strided"):
        alike(ours, theirs)


@pytest.mark.parametrize(
    "dtype, tolerance", [("float64", 1e-10), pytest.param("float32", 1e-4, marks=pytest.mark.slow)]
)
def test_29_syncbatchnorm_is_one_batchnorm_of_all_processes(dtype, tolerance, tmp_path):
    names = [
        "small-strided", "small-basic-strided", "small-preact-bottleneck", "small-bias", "small-stem",
        "small-preact", "small-projection",
    ]  # fmt: skip
    for found in run(tmp_path, "sync", dtype, *names, ranks=3):
        assert len(found) == 2 * len(names)
        for ours, theirs in zip(found[::2], found[1::2], strict=True):
            alike(ours, theirs, tolerance)
