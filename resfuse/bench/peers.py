"""`python -m resfuse peers`: a library's own model tests, from a checkout of it, on fused models.

pytest runs them in a process of its own with the plugin `resfuse.testing.peers`. Tests that fail are run again, with
nothing fused: what fails then too (no network, another version of the library) is not ours.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..testing.environment import environment
from .results import write_json

FILES = {"timm": ("tests/test_models.py",), "torchvision": ("test/test_models.py", "test/test_backbone_utils.py")}
QUIET = "pytest.PytestUnknownMarkWarning", "DeprecationWarning"  # of plugins that are not installed, of torch.jit


def run(library: str, checkout: Path, arguments: Sequence[str], out: Path | None, console: Console) -> int:
    """Exit code: 0, or 1 where a test fails that passes without fusing, or nothing was fused."""
    checkout = checkout.resolve()
    files = [str(checkout / name) for name in FILES[library] if (checkout / name).is_file()]
    if not files:
        console.print(f"{checkout} has no {FILES[library][0]}: give the path of a checkout of {library}", style="red")
        return 1
    code, tests = _pytest(checkout, [*files, "--peer", library, *arguments])
    failed = [name for name, test in tests.items() if test["outcome"] == "failed"]
    without = {}
    if failed:
        console.print(f"without fusing, what failed: {len(failed)} tests", highlight=False)
        again = [str(checkout / name) for name in failed]
        _, without = _pytest(checkout, [*again, "--peer", library, "--peer-eager", "--tb=no"])
    results = _results(tests, without)
    if out is not None:
        command = shlex.join(["python", "-m", "resfuse", "peers", "--library", library, "PATH", *arguments])
        write_json(out, {
            "command": command, "environment": environment("cpu"), "library": library,
            "version": importlib.metadata.version(library), "checkout": _version(checkout), **results,
        })  # fmt: skip
    console.print(summary(results), highlight=False)
    broken = [name for name, test in results["failed"].items() if not test["without"]]
    for name in broken:
        console.print(f"{name}: {results['failed'][name]['text']}", style="red", markup=False, highlight=False)
    return int(bool(broken) or not results["fused_tests"] or (code != 0 and not failed))


def summary(results: dict) -> str:
    counts = ", ".join(f"{number} {outcome}" for outcome, number in results["outcomes"].items())
    same = sum(bool(test["without"]) for test in results["failed"].values())
    return (
        f"{counts} ({same} of the failed fail without fusing too); {results['fused_tests']} of those passed"
        f" ran fused blocks; {results['fused_calls']} calls in all did"
    )


def _pytest(checkout: Path, arguments: Sequence[str]) -> tuple[int, dict[str, dict]]:
    """pytest's exit code, and of each test outcome, text and counts. Its output is shown as it comes."""
    with tempfile.TemporaryDirectory() as folder:  # run in it, or the checkout's package would be imported
        out = Path(folder, "results.json")
        quiet = [part for name in QUIET for part in ("-W", f"ignore::{name}")]
        plain = ["-q", "--tb=short", "-p", "no:cacheprovider", *quiet, "-p", "resfuse.testing.peers"]
        ours = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))
        process = subprocess.run(
            [sys.executable, "-m", "pytest", *plain, "--rootdir", str(checkout), "--peer-results", out, *arguments],
            cwd=folder, env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
        return process.returncode, json.loads(out.read_text()) if out.exists() else {}


def _results(tests: dict[str, dict], without: dict[str, dict]) -> dict:
    """What a results file holds: outcomes and counts summed, what failed or may fail one by one."""
    counts: Counter[str] = Counter()
    for test in tests.values():
        counts.update(test["counts"])
    fused = [test for test in tests.values() if test["outcome"] == "passed" and test["counts"].get("fused_calls")]
    named = {
        outcome: {name: {"text": test["text"]} for name, test in tests.items() if test["outcome"] == outcome}
        for outcome in ("failed", "xfailed")
    }
    for name, test in named["failed"].items():
        again = without.get(name, {})
        test["without"] = (again["text"] or "failed") if again.get("outcome") == "failed" else None
    return {
        "outcomes": dict(Counter(test["outcome"] for test in tests.values())),
        "fused_tests": len(fused), **{key: counts[key] for key in ("models", "fused_models", "blocks", "fused_calls")},
        "original_calls": {key.partition(":")[2]: n for key, n in counts.items() if key.startswith("original_calls")},
        **named,
    }  # fmt: skip


def _version(checkout: Path) -> str | None:
    """The checkout's tag or commit, None where git knows none."""
    try:
        found = subprocess.run(
            ["git", "-C", str(checkout), "describe", "--tags", "--always"], capture_output=True, text=True
        )
    except OSError:
        return None
    return found.stdout.strip() or None
