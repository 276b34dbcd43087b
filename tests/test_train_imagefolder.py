"""examples/train_imagefolder.py: the same losses fused and eager, the same weights killed and not, two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from examples import sample_photographs, train_imagefolder

ROOT = Path(__file__).parents[1]
SIZE = 32
SETTINGS = ["--size", str(SIZE), "--batch", "128", "--epochs", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    assert sample_photographs.main([str(folder), "--size", str(SIZE)]) == 0
    return folder


def train(photographs, out, *more):
    assert train_imagefolder.main([str(photographs), *SETTINGS, "--out", str(out), *more]) == 0
    return torch.load(out / "checkpoint.pt", weights_only=True), [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
    ]


def command(photographs, out, *more):
    return ["examples.train_imagefolder", str(photographs), *SETTINGS, "--out", str(out), *more]


def started(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_the_sample_has_both_classes_in_both_parts(photographs):
    for part, count in sample_photographs.CROPS.items():
        for name in ("china", "flower"):
            assert len(list((photographs / part / name).glob("*.jpg"))) == count


def test_eager_and_fused_runs_learn_alike_and_continue_each_other(photographs, tmp_path):
    (eager, theirs), (fused, ours) = (
        train(photographs, tmp_path / blocks, "--blocks", blocks) for blocks in ("eager", "fused")
    )
    assert list(eager["model"]) == list(fused["model"]) and len(ours) == 2
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["train_loss"] == pytest.approx(its["train_loss"], rel=0.1)
    assert ours[1]["train_loss"] < ours[0]["train_loss"] < 0.7, "it has not learned"
    (tmp_path / "eager" / "checkpoint.pt").rename(tmp_path / "checkpoint.pt")
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    content["epoch"] = 1
    torch.save(content, tmp_path / "checkpoint.pt")
    _, rows = train(photographs, tmp_path, "--blocks", "fused", "--resume")
    assert [row["epoch"] for row in rows] == [0, 1, 1]


def test_a_killed_run_ends_in_the_same_weights(photographs, tmp_path):
    whole, rows = train(photographs, tmp_path / "whole")
    killed = tmp_path / "killed"
    process = started(*command(photographs, killed, "--save-every", "1"))
    until = time.monotonic() + 60
    while not (killed / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = torch.load(killed / "checkpoint.pt", weights_only=True)
    assert (left["epoch"], left["step"]) < (1, 1), "it was killed too late to show anything"
    torch.set_num_threads(1)
    found, its_rows = train(photographs, killed, "--resume")
    assert its_rows == rows
    for part in ("model", "ema"):
        assert all(torch.equal(found[part][name], t) for name, t in whole[part].items())


def test_two_processes(photographs, tmp_path):
    process = started(
        "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *command(photographs, tmp_path),
        "--epochs", "1",
    )  # fmt: skip
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert content["epoch"] == 1 and content["decided"]["processes"] == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("arguments, sentence", [
    (["nowhere"], "nowhere/train is not a folder"),
    (["{photographs}", "--model", "resnet19"], "no classifier 'resnet19'"),
    (["{photographs}", "--batch", "10000", "--device", "cpu"], "--batch 10000 is more than the 512 images"),
    (["{photographs}", "--sync-bn", "--device", "cpu"], "--sync-bn wants --device cuda"),
])  # fmt: skip
def test_what_does_not_fit_is_said(arguments, sentence, photographs, tmp_path, capsys):
    given = [a.replace("{photographs}", str(photographs)) for a in arguments]
    with pytest.raises(SystemExit):
        train_imagefolder.main([*given, "--out", str(tmp_path)])
    assert sentence in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_refused(photographs, tmp_path, capsys):
    train(photographs, tmp_path, "--epochs", "1")
    with pytest.raises(SystemExit):
        train(photographs, tmp_path, "--seed", "1", "--resume")
    assert "other values of epochs, seed" in capsys.readouterr().err
