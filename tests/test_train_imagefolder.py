"""examples/train_imagefolder.py: the same losses fused and eager, the same weights killed and not, two processes."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from examples import sample_photographs, train_imagefolder

ROOT = Path(__file__).parents[1]
CROPS = {"train": 64, "val": 8}  # of each photograph: 2 steps an epoch
# Smaller images, batches, or a higher rate make training chaotic: eager runs whose first weights differ in the last bit
# then end more than a few percent apart.
SIZE = 40
SETTINGS = ["--size", str(SIZE), "--batch", "64", "--epochs", "2", "--rate", "0.002", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes have that are started here: sums over several threads have other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_photographs, "CROPS", CROPS)
        assert sample_photographs.main([str(folder), "--size", str(SIZE)]) == 0
    return folder


@pytest.fixture(scope="module")
def runs(photographs, tmp_path_factory):
    """Uninterrupted ones, which also keep what they saved within the second epoch: {blocks: (folder, found, rows)}."""
    folder, replace = tmp_path_factory.mktemp("runs"), os.replace
    saved = []

    def keeping_the_third(source, target):
        replace(source, target)
        saved.append(target)
        if len(saved) % 4 == 3:
            os.link(target, target.with_name("within.pt"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", keeping_the_third)
        return {
            blocks: (folder / blocks, *train(photographs, folder / blocks, "--blocks", blocks, "--save-every", "1"))
            for blocks in ("eager", "fused")
        }


def train(photographs, out, *more):
    assert train_imagefolder.main([str(photographs), *SETTINGS, "--out", str(out), *more]) == 0
    return checkpoint(out), [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def run(photographs, *more):
    """Not begun yet."""
    options = train_imagefolder._parser().parse_args([str(photographs), *SETTINGS, *more])
    process = train_imagefolder.Process(0, 1, torch.device("cpu"))
    return train_imagefolder.Run(options, process, train_imagefolder.Data(options, process))


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def started(module, photographs, out, *more):
    arguments = [*module, "examples.train_imagefolder", str(photographs), *SETTINGS, "--out", str(out), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def assert_same(found, rows, whole, its_rows):
    """To the bit, all but the speed."""
    for part in ("model", "ema"):
        assert all(torch.equal(found[part][name], t) for name, t in whole[part].items())
    for row, its in zip(rows, its_rows, strict=True):
        assert {**row, "images_per_s": 0} == {**its, "images_per_s": 0}


def test_the_sample_has_both_classes_in_both_parts(photographs):
    for part, count in CROPS.items():
        for name in ("china", "flower"):
            assert len(list((photographs / part / name).glob("*.jpg"))) == count


def test_eager_and_fused_runs_learn_alike(runs):
    (_, eager, theirs), (_, fused, ours) = runs["eager"], runs["fused"]
    assert list(eager["model"]) == list(fused["model"]) and len(ours) == 2
    for mine, its, rel in zip(ours, theirs, (0.005, 0.05), strict=True):
        assert mine["train_loss"] == pytest.approx(its["train_loss"], rel=rel)
        assert mine["images_per_s"] > 0
    assert ours[1]["train_loss"] < 0.95 * ours[0]["train_loss"], "it has not learned"


@pytest.mark.parametrize("blocks", ["eager", "fused"])
def test_an_eager_run_goes_on_within_an_epoch(blocks, photographs, runs, tmp_path):
    folder, whole, rows = runs["eager"]
    os.link(folder / "within.pt", tmp_path / "checkpoint.pt")
    left = checkpoint(tmp_path)
    assert (left["epoch"], left["step"]) == (1, 1)
    found, its_rows = train(photographs, tmp_path, "--blocks", blocks, "--resume")
    if blocks == "eager":
        assert_same(found, its_rows, whole, rows)
    assert its_rows[0] == rows[0]
    assert its_rows[1]["train_loss"] == pytest.approx(rows[1]["train_loss"], rel=1e-3)


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_weights(photographs, runs, tmp_path):
    _, whole, rows = runs["fused"]
    process = started([], photographs, tmp_path, "--save-every", "1")
    until = time.monotonic() + 60
    while not (tmp_path / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = checkpoint(tmp_path)
    assert (left["epoch"], left["step"]) < (2, 0), "it was killed too late to show anything"
    assert_same(*train(photographs, tmp_path, "--resume"), whole, rows)


@pytest.mark.slow
def test_two_processes(photographs, tmp_path):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    process = started(torchrun, photographs, tmp_path, "--epochs", "1")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count("blocks fused") == 1, output
    content = checkpoint(tmp_path)
    assert content["epoch"] == 1 and content["decided"]["processes"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "metrics.jsonl"]
    (row,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    # One process finds the same on the whole of val: all have evaluated what is in the checkpoint.
    alone = run(photographs)
    for part, name in (("model", "val_loss"), ("ema", "ema_accuracy")):
        alone.parts[part].load_state_dict(content[part])
        loss, accuracy = alone.evaluate(alone.parts[part])
        assert {"val_loss": loss, "ema_accuracy": accuracy}[name] == pytest.approx(json.loads(row)[name], rel=1e-5)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # GradScaler's first step overflows
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision(precision, photographs, tmp_path):
    content, (row,) = train(photographs, tmp_path, "--precision", precision, "--epochs", "1")
    assert all(t.isfinite().all() for t in content["model"].values()) and row["train_loss"] < 1
    assert bool(content["scaler"]) == (precision == "float16")


def test_an_image_is_augmented_alike_by_any_worker_and_after_any_step(photographs):
    def batches(epoch, first, workers):
        return [images for images, _ in run(photographs, "--workers", str(workers)).data.batches(epoch, first)]

    whole, rest = batches(1, 0, workers=0), batches(1, 1, workers=2)
    assert len(whole) == 2 and all(torch.equal(a, b) for a, b in zip(whole[1:], rest, strict=True))
    images, found = run(photographs).data.train, []
    for images.epoch in (0, 1):
        found.append(images[0][0])
    assert not torch.equal(*found)


def test_seeds_differ_by_each_number_in_the_bits_that_count():
    seeds = {train_imagefolder.mixed(*numbers) % 2**32 for numbers in itertools.product(range(8), repeat=4)}
    assert len(seeds) == 8**4


@pytest.mark.parametrize("arguments, sentence", [
    (["nowhere"], "nowhere/train is not a folder"),
    (["{empty}"], "find any class folder in"),
    (["{mixed}"], "train has the classes ['china', 'flower'], val ['china']"),
    (["{photographs}", "--model", "resnet19"], "no classifier 'resnet19'"),
    (["{photographs}", "--batch", "10000"], "--batch 10000 is more than the 128 images"),
    (["{photographs}", "--batch", "0"], "--batch 0 must be a positive multiple"),
    (["{photographs}", "--sync-bn"], "--sync-bn wants --device cuda"),
])  # fmt: skip
def test_what_does_not_fit_is_said(arguments, sentence, photographs, tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / "empty" / part).mkdir(parents=True)
    shutil.copytree(photographs, tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "val" / "flower")
    folders = {"photographs": photographs, "empty": tmp_path / "empty", "mixed": tmp_path / "mixed"}
    with pytest.raises(SystemExit):
        train_imagefolder.main([*(a.format_map(folders) for a in arguments), "--device", "cpu"])
    assert sentence in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_refused(photographs, runs, capsys):
    folder, _, _ = runs["eager"]
    with pytest.raises(SystemExit):
        train(photographs, folder, "--seed", "1", "--precision", "bfloat16", "--resume")
    assert "other values of precision, seed" in capsys.readouterr().err
