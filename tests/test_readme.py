"""The README's numbers are those of a results file in the repository."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from resfuse.bench import agree, agreement, coverage, profile, roofline

ROOT = Path(__file__).parents[1]


def script(name="readme"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page, count", [("README.md", 1), ("docs/cpu.md", 2)])
def test_the_tables_are_what_the_results_files_give(page, count):
    text = (ROOT / page).read_text()
    names = set(re.findall(r"(benchmarks/results/cpu\S+\.json)", text))
    assert len(names) == count
    for name in names:
        results = json.loads((ROOT / name).read_text())
        assert results["gate"]["passed"] is True
        assert "\n".join([*script().HEAD, *script().rows(results)]) in text
        assert results["command"] in text and results["environment"]["device"] in text


def test_the_memory_table_is_what_its_results_file_gives():
    text = (ROOT / "docs" / "memory.md").read_text()
    names = re.findall(r"benchmarks\.(memory\w*) --table (\S+\.json)", text)
    assert [module for module, _ in names] == ["memory", *["memory_step"] * 2, "memory_limit"]
    for module, name in names:
        assert "\n".join(script(module).table(json.loads((ROOT / name).read_text()))) in text


def test_the_kernel_tables_are_what_their_results_file_gives():
    text = (ROOT / "docs" / "triton.md").read_text()
    (name,) = set(re.findall(r"--table (\S+\.json)", text))
    results, kernels = json.loads((ROOT / name).read_text()), script("kernels")
    for table in (kernels.kernel_table(results), kernels.traffic_table(results)):
        assert "\n".join(table) in text
    assert results["command"] in text and "+dirty" not in results["environment"]["commit"]


def test_the_gpu_table_is_what_its_results_file_gives():
    text = (ROOT / "docs" / "gpu.md").read_text()
    names = set(re.findall(r"benchmarks.primitives (\S+\.json)", text))
    assert len(names) == 2
    for name in names:
        results = json.loads((ROOT / name).read_text())
        assert "\n".join(script("primitives").table(results)) in text
        assert "\n".join(script("train_step").table(results)) in text
        assert results["environment"]["device"] in text
        for each in results["tests"]:
            failed = f", {each['failed']} failed" if each["failed"] else ""
            assert f"{each['passed']} passed{failed}" in text
        ways = [row for row in results["resnet50"].values() if isinstance(row, dict)]
        host = (row["host_ms"]["median"] for row in ways if "host_ms" in row)
        assert all(f"{median:g} ms" in text for median in host)


def test_the_overhead_table_is_what_its_results_file_gives():
    text = (ROOT / "docs" / "compatibility.md").read_text()
    results = json.loads((ROOT / "benchmarks" / "results" / "overhead.json").read_text())
    assert "\n".join(script("overhead").table(results)) in text and results["command"] in text
    assert f"took {results['fuse_resnet50_ms']:g} ms" in text


@pytest.mark.parametrize("library", coverage.LIBRARIES)
def test_the_coverage_tables_are_what_their_results_files_give(library):
    text = (ROOT / "docs" / "models.md").read_text()
    results = json.loads((ROOT / "benchmarks" / "results" / f"coverage-{library}.json").read_text())
    assert "\n".join(coverage.families(results)) in text and results["command"].split(" --json")[0] in text
    assert coverage.summary([coverage.Row(**each) for each in results["models"]]) in " ".join(text.split())


def test_the_table_of_families_is_what_its_results_file_gives():
    text = (ROOT / "docs" / "models.md").read_text()
    results = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text())
    assert "\n".join(script("families").table(results)) in text and results["command"] in text


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_the_table_of_peers_is_what_their_results_files_give(library):
    name = f"benchmarks/results/peers-{library}.json"
    results = json.loads((ROOT / name).read_text())
    outcomes = ", ".join(f"{number} {outcome}" for outcome, number in results["outcomes"].items())
    row = f"| {library} {results['version']} | {outcomes} | {results['fused_tests']} | `{name}` |"
    assert row in (ROOT / "docs" / "models.md").read_text()
    assert all(test["without"] for test in results["failed"].values())


def test_the_tables_of_the_roofline_are_what_their_results_file_gives():
    text = (ROOT / "docs" / "roofline.md").read_text()
    results, gpu = (json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in ("roofline", "h100"))
    for table in (roofline.totals_table, roofline.primitives_table):
        assert "\n".join(roofline.markdown(table(results))) in text
    shares = [results["totals"][n]["floor_ms"] / gpu["resnet50"][n]["device_ms"] for n in ("eager", "resfuse")]
    assert "eager's floor is {:.0%} of it,\nours {:.0%}.".format(*shares) in text
    assert results["command"].split(" --json")[0] in text and results["ceilings"]["source"] in text
    assert "+dirty" not in results["environment"]["commit"]


@pytest.mark.parametrize("name", ["alternatives", "alternatives-inplace-abn"])
def test_the_tables_of_alternatives_are_what_their_results_files_give(name):
    text, results = (ROOT / "docs" / "benchmarking.md").read_text(), results_of(name)
    assert "\n".join(script("peers").table(results)) in text and results["command"] in text
    assert "+dirty" not in results["environment"]["commit"]


@pytest.mark.parametrize("library", coverage.LIBRARIES)
def test_the_counts_of_models_that_agree_are_what_their_results_files_give(library):
    text = " ".join((ROOT / "docs" / "models.md").read_text().split())
    rows = agree.load(ROOT / "benchmarks" / "results" / f"agree-{library}.json")
    assert agree.summary(rows) in text
    assert all(row.agreement["gradients"] < agreement.TOLERANCE for row in rows if row.agreement)


def test_the_table_of_convergence_is_what_its_results_file_gives():
    text = (ROOT / "docs" / "benchmarking.md").read_text()
    results, convergence = results_of("convergence"), script("convergence")
    assert "\n".join(convergence.table(results)) in text and results["command"] in text
    deep = [run for run in results["runs"] if (run["network"], run["mode"]) == ("110 layers", "bfloat16")]
    assert {run["seed"] for run in deep} >= {0, 1, 2} and "+dirty" not in results["environment"]["commit"]
    for run in deep:  # which the page says of them
        assert all(map(math.isfinite, run["curve"])) and run["curve"][-1] < 1 < run["curve"][0]


def results_of(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_report_that_profiling_reads_is_in_its_results_file():
    text = (ROOT / "docs" / "profiling.md").read_text()
    results = json.loads((ROOT / "benchmarks" / "results" / "profile.json").read_text())
    for name, kind, count, only in (
        ("eager", "kernels", 9, ""), ("resfuse", "kernels", 11, ""), ("resfuse", "ranges", 9, "resfuse."),
    ):  # fmt: skip
        assert "\n".join(profile.table(results, name, kind, count, only)) in text
    assert results["command"] in text and "+dirty" not in results["environment"]["commit"]


def test_the_figure_exists_and_is_named():
    figures = re.findall(r"!\[[^\]]*\]\((\S+\.png)\)", (ROOT / "README.md").read_text())
    assert len(figures) == 1 and (ROOT / figures[0]).stat().st_size > 10_000


DOCS = sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "examples/README.md", "benchmarks/README.md", *DOCS]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target
