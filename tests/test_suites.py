"""The pytest-benchmark suites and the comparison of revisions measure what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compare, groups
from benchmarks.conftest import Clock
from resfuse.bench.implementations import IMPLEMENTATIONS, Implementation

ROOT = Path(__file__).parents[1]


def test_the_clock_tells_the_measured_times_again():
    clock = Clock()
    clock.set([0.25, 3.0])
    rounds = [(clock(), clock()) for _ in range(2)]
    assert [end - begin for begin, end in rounds] == [0.25, 3.0]


def test_a_group_has_what_runs_with_its_memory_and_why_the_rest_does_not(monkeypatch):
    def fails(model):
        raise RuntimeError("no such thing")

    monkeypatch.setitem(IMPLEMENTATIONS, "broken", Implementation("broken", fails))
    group = groups.workload_group("small-resnet", "float32", 2, ("eager", "resfuse", "broken"), torch.device("cpu"))
    assert list(group.calls) == ["eager", "resfuse"] and "no such thing" in group.missing["broken"]
    ours, theirs = group.extra["resfuse"], group.extra["eager"]
    assert 0 < ours["saved_bytes"] < theirs["saved_bytes"] and ours["peak_bytes"] > 0 and ours["batch"] == 2
    assert group.calls["resfuse"]() is None
    evaluated = groups.workload_group("small-resnet-eval", "float32", 2, ("eager",), torch.device("cpu"))
    assert "saved_bytes" not in evaluated.extra["eager"]


def test_primitives_are_called_by_each_set():
    group = groups.primitive_group("small-identity", "covariance", torch.float32, 2, torch.device("cpu"))
    assert set(group.calls) == {"eager", "auto"} and group.extra["auto"]["operations"] > 0
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*(call() for call in group.calls.values()), strict=True))


@pytest.mark.slow
def test_the_suites_run_and_interleave(tmp_path):
    path = tmp_path / "b.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
               "--benchmark-only", "-k", "(primitives and stage3 and finalize) or (blocks and stage3)",
               f"--benchmark-json={path}"]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    rows = json.loads(path.read_text())["benchmarks"]
    assert {row["group"] for row in rows} == {"stage3 finalize float32", "stage3 float32"} and len(rows) == 4
    ours = [row for row in rows if row["params"].get("implementation") == "resfuse" or "auto" in row["name"]]
    for row in ours:
        assert row["extra_info"]["speedup"]["pairs"] == row["stats"]["rounds"] >= 3 and row["stats"]["median"] > 0
        assert {"device", "commit"} <= set(row["extra_info"])


@pytest.mark.slow
def test_two_trees_are_timed_in_turn():
    """The tree with itself: both processes answer, and what they keep is alike."""
    (row,) = compare.compare((ROOT, ROOT), ["small-resnet"], "float32", 2, "cpu", 0.5)
    assert row["faster"]["pairs"] == row["this"]["rounds"] == row["other"]["rounds"] >= 4
    assert row["memory"][0] == row["memory"][1] and row["memory"][0]["saved_bytes"] > 0


def test_a_regression_is_told():
    faster = {"median": 0.9, "low": 0.85, "high": 0.95}
    row = {"faster": faster, "memory": [{"saved_bytes": 3}, {"saved_bytes": 2}]}
    assert compare.regressed(row) == ["0.90x as fast", "keeps 1.50x"]
    row = {"faster": {**faster, "high": 1.01}, "memory": [{}, {}]}  # the interval reaches 1
    assert compare.regressed(row) == []


def test_a_revision_becomes_a_tree_with_a_library(tmp_path, monkeypatch):
    if not (ROOT / ".git").exists() or not (ROOT / "resfuse" / "_build.json").exists():
        pytest.skip("no checkout, or nothing is built")
    if compare._git("diff", "--name-only", "HEAD", "--", *compare.NATIVE):
        pytest.skip("the native sources differ from HEAD: it would be built")
    monkeypatch.setattr(compare, "TREES", tmp_path)
    tree = compare.tree_of("HEAD")
    assert tree.parent == tmp_path and (tree / "csrc" / "schemas.h").exists()
    assert {p.name for p in (tree / "resfuse").glob("*.so")} == {p.name for p in (ROOT / "resfuse").glob("*.so")}
    assert compare.tree_of("HEAD") == tree  # made once
