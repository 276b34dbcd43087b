"""Two revisions, step by step in turn: make bench COMPARE=REVISION, or

    python -m benchmarks.compare REVISION [--subjects resnet50,stage1] [--mode float32] [--batch 8] [--out FILE]

The other revision's tree is taken from git into build/compare, and its library built there unless it has this tree's
sources. Each tree has a process of its own, which holds a warm fused model of its own; this one asks them for a step in
turn, so that what else the machine does meets both alike. Exit code 1 where this tree is slower or keeps more: the
median below LEAST and the whole interval below 1, or more saved bytes.

A revision is asked for what `python -m resfuse bench` has had since its first results: `workloads.make`, its runners.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

LEAST = 0.97
ROOT = Path(__file__).parents[1]
TREES = ROOT / "build" / "compare"
NATIVE = ("csrc", "setup.py")  # what the native library is made of
DEFAULT = "stage1,stage3,basic-stage1,resnet50"


class Side:
    """A process that holds one tree's fused model."""

    def __init__(self, tree: Path, device: str):
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--device", device]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=tree
        )

    def ask(self, *words: object) -> dict:
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a worker ended with exit code {self.process.wait()}; what it said is above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def worker(device: str) -> None:
    """Answers requests, a line each: ["make", subject, mode, batch] or ["step"]."""
    import torch

    from resfuse.bench.implementations import IMPLEMENTATIONS
    from resfuse.bench.workloads import make
    from resfuse.testing.memory import peak_bytes, saved_bytes

    answers, sys.stdout = sys.stdout, sys.stderr  # what else is printed is no answer
    call = None
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        if what == "make":
            runner = make(*arguments, device).runner(IMPLEMENTATIONS["resfuse"])
            call = list(runner.passes().values())[-1]
            for _ in range(3):  # the second call of a kind is noted, the third replayed
                call()
            answer = {}
            if runner.model.training:
                answer["saved_bytes"] = saved_bytes(runner.forward, runner.model, [runner.x])
                answer["peak_bytes"] = peak_bytes(runner.step, device)
        else:
            began = time.perf_counter()
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            answer = {"seconds": time.perf_counter() - began}
        print(json.dumps(answer), file=answers, flush=True)


def tree_of(revision: str) -> Path:
    """A folder with the revision's files and its library."""
    commit = _git("rev-parse", "--short=12", f"{revision}^{{commit}}")
    tree = TREES / commit
    if (tree / "resfuse" / "_build.json").exists():
        return tree
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    if _git("diff", "--name-only", commit, "--", *NATIVE):
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, check=True)
    else:
        for path in (*(ROOT / "resfuse").glob("*.so"), ROOT / "resfuse" / "_build.json"):
            shutil.copy2(path, tree / "resfuse")
    return tree


def compare(
    trees: Sequence[Path], subjects: Sequence[str], mode: str, batch: int, device: str, seconds: float
) -> list[dict]:
    """trees: this one's and the other's. seconds: of rounds, for each subject."""
    from resfuse.testing.timing import interleave, ratio, summary

    sides, rows = [Side(tree, device) for tree in trees], []
    try:
        for subject in subjects:
            memory = [side.ask("make", subject, mode, batch) for side in sides]
            taken = {name: [] for name in ("this", "other")}
            calls = {
                name: lambda side=side, own=own: own.append(side.ask("step")["seconds"])
                for (name, own), side in zip(taken.items(), sides, strict=True)
            }
            interleave(calls, budget=seconds, minimum=5, maximum=201)
            this, other = (own[1:] for own in taken.values())  # the first was the warm-up
            rows.append({
                "subject": subject, "mode": mode, "batch": batch, "this": summary(this)._asdict(),
                "other": summary(other)._asdict(), "faster": ratio(other, this)._asdict(), "memory": memory,
            })
    finally:
        for side in sides:
            side.close()
    return rows


def regressed(row: dict) -> list[str]:
    """What got worse, in words."""
    found, (this, other) = [], row["memory"]
    if row["faster"]["median"] < LEAST and row["faster"]["high"] < 1:
        found.append(f"{row['faster']['median']:.2f}x as fast")
    if this.get("saved_bytes", 0) > other.get("saved_bytes", 0):
        found.append(f"keeps {this['saved_bytes'] / other['saved_bytes']:.2f}x")
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="This tree against another revision, step by step in turn.")
    parser.add_argument("revision", nargs="?", help="of git, or the folder of a built tree")
    parser.add_argument("--subjects", default=DEFAULT, help=f"of python -m resfuse bench; default {DEFAULT}")
    parser.add_argument("--mode", default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each subject's rounds (default: 20)")
    parser.add_argument("--out", type=Path, default=Path("resfuse-compare.json"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(options.device)
        return 0
    from resfuse.bench.results import write_json
    from resfuse.testing.environment import environment

    other = Path(options.revision) if Path(options.revision).is_dir() else tree_of(options.revision)
    rows = compare(
        (ROOT, other.resolve()), options.subjects.split(","), options.mode, options.batch, options.device,
        options.seconds,
    )  # fmt: skip
    write_json(options.out, {
        "command": f"python -m benchmarks.compare {options.revision}", "environment": environment(options.device),
        "revision": options.revision, "rows": rows,
    })
    for row in rows:
        f, worse = row["faster"], regressed(row)
        print(f"{row['subject']}: {f['median']:.3f}x as fast ({f['low']:.3f}-{f['high']:.3f}, {f['pairs']} pairs)"
              + (f"  WORSE: {', '.join(worse)}" if worse else ""))
    return 1 if any(map(regressed, rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
