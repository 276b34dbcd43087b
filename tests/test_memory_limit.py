"""Training in processes that may not have more memory: benchmarks/memory_limit.py, small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = ("--subject=resnet152", "--batch=16", "--size=64", "--steps=1", "--limit=128", "--ways=eager;leanest")


@pytest.mark.slow
def test_leanest_trains_where_eager_runs_out_of_memory(tmp_path):
    out = tmp_path / "limit.json"
    command = [sys.executable, "-m", "benchmarks.memory_limit", *SETTINGS, "--out", str(out)]
    subprocess.run(command, check=True, cwd=ROOT)
    ways = json.loads(out.read_text())["ways"]
    assert ways["eager"]["stopped"] == "out of memory" and not ways["eager"]["losses"]
    assert ways["leanest"]["stopped"] is None and len(ways["leanest"]["losses"]) == 1
    assert ways["leanest"]["resident_bytes"] < 128 * 2**20
