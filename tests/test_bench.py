"""`python -m resfuse`: a red gate reports no speed, results are complete, training is judged."""

import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import resfuse
from benchmarks import train_step
from resfuse.bench import command, gate, info, verify
from resfuse.bench.implementations import EAGER, IMPLEMENTATIONS, RESFUSE, Implementation
from resfuse.bench.photographs import photographs
from resfuse.bench.plan import Job, Plan, fit, plan
from resfuse.bench.results import write_json
from resfuse.kernels.interface import PRIMITIVES, Reason

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("cpu-*.json"))
SMALL_PLAN = Plan(6.0, tuple(
    Job(subject, mode, 4, 8, (EAGER.name, RESFUSE.name), 1.0, gate_batch=4)
    for subject, mode in (
        ("small-projection", "float32"), ("small-projection", "autocast-bfloat16"), ("small-resnet", "float32"),
        ("small-resnet-eval", "float32"),
    )
))


def run(tmp_path, implementations=IMPLEMENTATIONS, chosen=SMALL_PLAN):
    console = Console(width=200, record=True, file=io.StringIO())
    files = tmp_path / "r.json", tmp_path / "r.png"
    code = command.bench(chosen, "python -m resfuse bench", *files, torch.device("cpu"), console, implementations)
    return code, json.loads(files[0].read_text()), console.export_text(), files[1].exists()


def test_a_run_has_errors_memory_and_time_of_everything(tmp_path):
    code, results, text, figure = run(tmp_path)
    assert code == 0 and figure and results["gate"]["passed"] is True
    keys = {(job.subject, job.mode) for job in SMALL_PLAN.jobs}
    for rows in (results["gate"]["rows"], results["times"]):
        assert {(row["subject"], row["mode"]) for row in rows} == keys
    assert {(row["subject"], row["mode"]) for row in results["memory"]} == {k for k in keys if "eval" not in k[0]}
    ours = [row for row in results["times"] if row["implementation"] == RESFUSE.name]
    for evaluation, passes in ((False, {"forward", "forward+backward"}), (True, {"no_grad", "inference_mode"})):
        assert {row["passes"] for row in ours if ("eval" in row["subject"]) == evaluation} == passes
    assert all(row["speedup"]["low"] <= row["speedup"]["median"] <= row["speedup"]["high"] for row in ours)
    assert all(row["saved_bytes"] > 0 and row["batch"] in (4, 8) for row in results["memory"])
    environment = results["environment"]
    assert environment["versions"]["torch"] == torch.__version__ and environment["device"] and "commit" in environment
    assert "small-resnet" in text
    table = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert {row["subject"] for row in table} == {job.subject for job in SMALL_PLAN.jobs}
    steps = [row for row in table if row["what"] == "seconds of forward+backward"]
    assert {row["seconds"]["median"] for row in ours if row["passes"] == "forward+backward"} == {
        float(row["value"]) for row in steps if row["implementation"] == RESFUSE.name
    }


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_have_their_table(path):
    results, table = json.loads(path.read_text()), list(csv.DictReader(path.with_suffix(".csv").open()))
    for what, rows, value in (
        ("seconds of ", results["times"], lambda row: row["seconds"]["median"]),
        ("saved bytes", results["memory"], lambda row: row["saved_bytes"]),
        ("error of ", results["gate"]["rows"], lambda row: row["ours"]),
    ):
        assert sorted(map(value, rows)) == sorted(float(r["value"]) for r in table if r["what"].startswith(what))


def test_a_red_gate_reports_no_speed(tmp_path):
    def wrong(model):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.data.mul_(1.5)
        return resfuse.fuse(model)

    broken = {**IMPLEMENTATIONS, RESFUSE.name: Implementation(RESFUSE.name, wrong)}
    code, results, text, figure = run(tmp_path, broken)
    assert code != 0 and not figure
    assert results["gate"]["passed"] is False and results["times"] == [] and results["memory"] == []
    assert "forward+backward" not in text


def test_the_gate_judges_against_float64():
    rows = gate.judge("small-projection", "float32", 4, RESFUSE)
    assert {"out", "dx"} <= {row.quantity for row in rows} and all(row.passed for row in rows)
    assert all(0 < row.ours <= row.allowed < 1e-3 for row in rows)


def test_an_implementation_that_fails_is_a_note(tmp_path):
    def fails(model):
        raise RuntimeError("no such thing")

    implementations = {**IMPLEMENTATIONS, "peer": Implementation("peer", fails)}
    job = replace(SMALL_PLAN.jobs[0], implementations=(EAGER.name, "peer", RESFUSE.name), memory_batch=4)
    code, results, _, _ = run(tmp_path, implementations, Plan(3.0, (job,)))
    assert code == 1, "the run is not what was asked for"
    assert [(note["implementation"], note["code"]) for note in results["notes"]] == [("peer", "failed")]
    assert "no such thing" in results["notes"][0]["text"]


def test_a_slow_machine_times_a_smaller_batch():
    job = replace(SMALL_PLAN.jobs[0], batch=8, gate_batch=8)
    fast, slow = fit(job, "cpu", lambda call: 1e-6), fit(job, "cpu", lambda call: 10.0)
    assert fast.batch == 8 and slow.batch == 1 and slow.gate_batch == 1


def test_the_recorded_command_is_what_can_be_run_again(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    recorded = command._recorded(["bench", "--json", "a.json", "--quick", "--png=b.png", "--budget", "9"])
    assert recorded == "ATEN_CPU_CAPABILITY=avx2 python -m resfuse bench --quick --budget 9"


def test_plans_grow_with_their_extent():
    quick, default, full = (plan("cpu", extent) for extent in ("quick", "default", "full"))
    assert len(quick.jobs) < len(default.jobs) < len(full.jobs)
    compiled = [job for job in default.jobs if "torch.compile" in job.implementations]
    assert {job.subject for job in compiled} == {"stage1", "resnet50"}
    assert {(job.subject, job.batch) for job in default.jobs} >= {
        ("stage3", 16), ("stage4", 32), *(("resnet50-eval", batch) for batch in (1, 8, 32))
    }
    assert default.budget <= 310, "make bench runs a gate before it, six minutes in all"


def test_photographs_are_real_and_drawn_anew():
    a, b = photographs(3, 32, 0), photographs(3, 32, 1)
    assert a.shape == (3, 3, 32, 32) and torch.equal(a, photographs(3, 32, 0)) and not torch.equal(a, b)
    assert a.std() > 0.3 and a.abs().max() < 5


def test_a_cut_off_write_leaves_the_file(tmp_path):
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.slow
def test_digits_train_alike():
    """100 steps follow eager's loss within its own seed-to-seed spread."""
    found = verify.verify(seeds=range(2), steps=100)
    assert found.passed and found.distance < found.spread
    assert min(found.eager_accuracy + found.fused_accuracy) > 0.7
    assert found.fused[0][-1] < 0.5 * found.fused[0][0]


def test_training_that_strays_is_seen():
    def wrong(model):
        for parameter in model.parameters():
            parameter.data.mul_(0.2)
        return resfuse.fuse(model)

    found = verify.verify(seeds=range(2), steps=40, fuse=wrong)
    assert not found.passed
    with pytest.raises(ValueError, match="at least 2 seeds"):
        verify.verify(seeds=[0], steps=1)


def test_info_says_what_runs(capsys):
    assert command.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "Bottleneck" in text and f"{len(PRIMITIVES)} of {len(PRIMITIVES)}" in text


def test_info_says_what_is_missing_and_how_to_get_it(monkeypatch):
    monkeypatch.setattr(info._native, "unavailable", lambda: (Reason("native_missing", "`pip install` builds it"),))
    monkeypatch.setattr(info, "WANTED", (("no_such_module", "nothing", "such-a-package"),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = dict(info.missing(torch.device("cpu")))
    assert {"native_missing", "gpu_missing", "package_missing"} <= set(found)
    assert found["package_missing"].endswith("pip install such-a-package")


def gpu_command(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_the_gpu_command_runs_its_parts(tmp_path):
    """At tiny sizes on a CPU: every line of it, but for what only a GPU can say."""
    parts = "env,ceilings,tests,primitives,steps,blocks,resnet50,evaluation"
    done = gpu_command("--out", str(tmp_path), "--device", "cpu", "--smoke", "--parts", parts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads((tmp_path / "status.json").read_text()).values()) == {"ok"}
    for part in ("blocks", "resnet50", "evaluation"):
        results = json.loads((tmp_path / f"{part}.json").read_text())
        assert results["gate"]["passed"] is True and results["kind"] == part
        assert {row["mode"] for row in results["times"]} == {"autocast-bfloat16", "autocast-float16"}
        assert all(row["peak_bytes"] for row in results["memory"])  # evaluation has no such rows
    assert json.loads((tmp_path / "ceilings.json").read_text())["copy"]["tb_s"] > 0
    assert json.loads((tmp_path / "steps.json").read_text())["lean"]["step_ms"]["median"] > 0
    primitives = json.loads((tmp_path / "primitives.json").read_text())
    rows = primitives["rows"]
    assert all(row["forward"] > 0 < row["backward"] for row in primitives["host"])
    assert {row["set"] for row in rows} == {"eager", "auto"} and all(row["error"] < 0.02 for row in rows)
    assert all(row["copy_share"] > 0 for row in rows if row["bytes"])
    assert "blocks: ok" in done.stdout


def test_a_train_step_is_timed():
    """On a CPU: what needs no GPU of it."""
    found = train_step.measure("resnet18", 2, 32, torch.device("cpu"), ["eager", "resfuse", "lean"], rounds=2, row=1)
    assert set(found) == {"eager", "resfuse", "lean"} and found["resfuse"]["loss"] == found["lean"]["loss"]
    assert abs(found["eager"]["loss"] - found["resfuse"]["loss"]) < 0.5
    assert all(row["step_ms"]["low"] <= row["step_ms"]["median"] <= row["step_ms"]["high"] for row in found.values())
    head, _, *rows = train_step.table({"environment": {"cores": 1}, "batch": 2, **found})
    assert len(rows) == 3 and all(row.count("|") == head.count("|") for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has_gpu: this is about machines without one")
def test_the_gpu_command_says_that_there_is_no_gpu(tmp_path):
    done = gpu_command("--out", str(tmp_path))
    assert done.returncode != 0 and "needs a GPU" in done.stderr
    assert "unknown part speed" in gpu_command("--out", str(tmp_path), "--parts", "speed").stderr
