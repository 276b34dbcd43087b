"""Train a torchvision network on a folder of images, with eager or fused blocks.

    python -m examples.sample_photographs photographs           # or any folder with train/CLASS/* and val/CLASS/*
    python -m examples.train_imagefolder photographs --blocks fused
    torchrun --nproc-per-node 2 -m examples.train_imagefolder photographs --precision bfloat16

A run that was killed goes on with --resume and ends in the weights that it would have had: what a step reads and draws
depends on the seed, the epoch and the step alone. Checkpoints of eager and fused runs are the same files.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import resfuse

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which pretrained weights expect
DECIDES = ("model", "precision", "sync_bn", "epochs", "batch", "rate", "warmup", "weight_decay", "smoothing", "size",
           "seed", "ema_decay")  # fmt: skip


class Process(NamedTuple):
    """This process among those that torchrun started, or alone."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> Process:
        if "RANK" not in os.environ:
            return cls(0, 1, torch.device(device))
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), torch.device(device))

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        values = values.clone()
        if self.count > 1:
            dist.all_reduce(values)
        return values


class Augmented(Dataset):
    """Images whose augmentation depends on the seed, the epoch and the image alone, whatever worker reads it."""

    def __init__(self, images: ImageFolder, seed: int):
        self.images, self.seed, self.epoch = images, seed, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed(self.seed, self.epoch, index))
            return self.images[index]


def mixed(*numbers: int) -> int:
    """A seed in which each of the numbers tells: of 32 bits, all that torch's generator on a CPU looks at."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Data:
    """Both parts of the folder, this process's share of each."""

    def __init__(self, options: argparse.Namespace, process: Process):
        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        augment = [v2.RandomResizedCrop(options.size, scale=(0.4, 1)), v2.RandomHorizontalFlip()]
        resize = [v2.Resize(round(options.size * 8 / 7)), v2.CenterCrop(options.size)]
        self.train = Augmented(ImageFolder(options.data / "train", v2.Compose([*augment, *finish])), options.seed)
        self.sampler = DistributedSampler(self.train, process.count, process.rank, seed=options.seed, drop_last=True)
        val = ImageFolder(options.data / "val", v2.Compose([*resize, *finish]))
        if self.train.images.classes != val.classes:
            raise ValueError(f"train has the classes {self.train.images.classes}, val {val.classes}")
        self.classes = val.classes
        self.batch = options.batch // process.count
        self.settings = dict(num_workers=options.workers, pin_memory=process.device.type == "cuda")
        share = Subset(val, range(process.rank, len(val), process.count))
        self.val = DataLoader(share, self.batch, **self.settings)

    @property
    def steps(self) -> int:
        """In an epoch."""
        return len(self.sampler) // self.batch

    def batches(self, epoch: int, first: int) -> Iterator:
        """An epoch's, from a step on."""
        self.train.epoch = epoch
        self.sampler.set_epoch(epoch)
        indices = list(self.sampler)[first * self.batch :]
        return iter(DataLoader(self.train, self.batch, sampler=indices, drop_last=True, **self.settings))


class Run:
    """A network being trained, and everything that a checkpoint holds of it."""

    def __init__(self, options: argparse.Namespace, process: Process, data: Data):
        self.options, self.process, self.data = options, process, data
        torch.manual_seed(options.seed)
        net = torchvision.models.get_model(options.model, num_classes=len(data.classes))
        if options.sync_bn:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        self.net = net.to(process.device, memory_format=torch.channels_last)
        if options.blocks == "fused":
            resfuse.fuse(self.net)
        self.ema = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay), use_buffers=True)
        self.model = self.net if process.count == 1 else DistributedDataParallel(self.net)
        vectors = [p for p in net.parameters() if p.dim() < 2]  # biases and norms do not decay
        matrices = [p for p in net.parameters() if p.dim() >= 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(
            groups, options.rate, momentum=0.9, weight_decay=options.weight_decay, nesterov=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=options.precision == "float16")
        self.epoch = self.step = 0
        self.seen = torch.zeros(2, dtype=torch.float64, device=process.device)  # loss and images of this epoch
        self.history: list[dict] = []

    def rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine, as a share of the learning rate."""
        warmup, steps = (epochs * self.data.steps for epochs in (self.options.warmup, self.options.epochs))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    @property
    def parts(self) -> dict:
        return {"model": self.net, "ema": self.ema, "optimizer": self.optimizer, "schedule": self.schedule,
                "scaler": self.scaler}  # fmt: skip

    @property
    def decided(self) -> dict:
        """What a run that goes on must have in common with the one that began."""
        return {"processes": self.process.count, **{name: getattr(self.options, name) for name in DECIDES}}

    def save(self) -> None:
        """Whole or not at all: a run may be killed while it writes."""
        seen = self.process.total(self.seen)
        if self.process.rank:
            return
        content = {name: part.state_dict() for name, part in self.parts.items()}
        content |= {"epoch": self.epoch, "step": self.step, "seen": seen, "history": self.history}
        torch.save({**content, "decided": self.decided}, self.options.out / "checkpoint.partial")
        os.replace(self.options.out / "checkpoint.partial", self.options.out / "checkpoint.pt")

    def load(self) -> None:
        content = torch.load(self.options.out / "checkpoint.pt", map_location=self.process.device, weights_only=True)
        differ = [name for name, value in self.decided.items() if content["decided"][name] != value]
        if differ:
            raise ValueError(f"the checkpoint was made with other values of {', '.join(differ)}")
        for name, part in self.parts.items():
            part.load_state_dict(content[name])
        self.epoch, self.step, self.history = content["epoch"], content["step"], content["history"]
        if self.process.rank == 0:
            self.seen.copy_(content["seen"])

    def train_epoch(self, show: Callable[[int, float, float], None]) -> float:
        """From the step that the run is at to the epoch's end; returns images a second of all processes.

        show(steps, loss, images a second) after each step.
        """
        self.model.train()
        device, precision = self.process.device, getattr(torch, self.options.precision)
        first, images_a_step = self.step, self.data.batch * self.process.count
        start = began = time.perf_counter()
        for images, labels in self.data.batches(self.epoch, self.step):
            torch.manual_seed(mixed(self.options.seed, self.epoch, self.step, self.process.rank))
            images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                loss = F.cross_entropy(self.model(images).float(), labels, label_smoothing=self.options.smoothing)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
            self.ema.update_parameters(self.net)
            self.seen += torch.stack([loss.detach().double() * len(images), loss.new_tensor(len(images)).double()])
            self.step += 1
            show(self.step, loss.item(), images_a_step / (time.perf_counter() - began))
            began = time.perf_counter()
            if self.options.save_every and self.step % self.options.save_every == 0 and self.step < self.data.steps:
                self.save()
        return (self.step - first) * images_a_step / (time.perf_counter() - start)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Loss and accuracy on the whole of val."""
        model.eval()
        if self.process.count > 1:  # running statistics differ by process; rank 0's are in the checkpoint
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        device, precision = self.process.device, getattr(torch, self.options.precision)
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for images, labels in self.data.val:
            images, labels = images.to(device, memory_format=torch.channels_last), labels.to(device)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                out = model(images).float()
            loss, right = F.cross_entropy(out, labels, reduction="sum"), (out.argmax(1) == labels).sum()
            sums += torch.stack([loss.double(), right.double(), right.new_tensor(len(labels)).double()])
        loss, right, count = self.process.total(sums).tolist()
        return loss / count, right / count

    def finish_epoch(self, images_per_second: float) -> None:
        (val_loss, accuracy), (_, ema_accuracy) = self.evaluate(self.net), self.evaluate(self.ema)
        loss, images = self.process.total(self.seen).tolist()
        row = {"epoch": self.epoch, "train_loss": loss / images, "val_loss": val_loss, "val_accuracy": accuracy,
               "ema_accuracy": ema_accuracy, "images_per_s": images_per_second}  # fmt: skip
        if self.process.device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.history.append(row)
        if self.process.rank == 0:  # before the checkpoint, after which a run that was killed would not write it again
            lines = "".join(json.dumps(row) + "\n" for row in self.history)
            (self.options.out / "metrics.jsonl").write_text(lines)
        self.epoch, self.step = self.epoch + 1, 0
        self.seen.zero_()
        self.save()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    for part in ("train", "val"):
        if not (options.data / part).is_dir():
            parser.error(f"{options.data / part} is not a folder; data must have train/CLASS/* and val/CLASS/*")
    if options.model not in torchvision.models.list_models(module=torchvision.models):
        parser.error(f"--model: torchvision has no classifier {options.model!r}")
    if options.sync_bn and options.device != "cuda":
        parser.error("--sync-bn wants --device cuda: DistributedDataParallel refuses SyncBatchNorm on a CPU")
    process = Process.join(options.device)
    _train(parser, options, process)
    if process.count > 1:
        # Gloo's threads end with the group, to which DistributedDataParallel holds on. One that outlives the
        # interpreter, and wants it to free a tensor, takes the process down.
        gc.collect()
        dist.destroy_process_group()
    return 0


def _train(parser: argparse.ArgumentParser, options: argparse.Namespace, process: Process) -> None:
    if options.batch < 1 or options.batch % process.count:
        parser.error(f"--batch {options.batch} must be a positive multiple of the {process.count} processes")
    try:
        data = Data(options, process)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if data.steps == 0:
        parser.error(f"--batch {options.batch} is more than the {len(data.train)} images of {options.data / 'train'}")
    options.out.mkdir(parents=True, exist_ok=True)
    run, console = Run(options, process, data), Console(quiet=process.rank > 0)
    if options.blocks == "fused":
        report = resfuse.report(run.net, input_size=(1, 3, options.size, options.size))
        console.print(str(report).splitlines()[0], highlight=False)
    if options.resume and (options.out / "checkpoint.pt").exists():
        try:
            run.load()
        except ValueError as error:
            parser.error(f"--resume: {error}")
        console.print(f"going on in epoch {run.epoch}, step {run.step}", highlight=False)
    fields = TextColumn("loss {task.fields[loss]:.3f}, rate {task.fields[rate]:.4f}, {task.fields[speed]:.0f} images/s")
    columns = (TextColumn("epoch {task.description}"), BarColumn(), MofNCompleteColumn(), fields, TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        while run.epoch < options.epochs:
            first, task = run.step, progress.add_task(str(run.epoch), total=data.steps, loss=0, rate=0, speed=0)

            def show(step: int, loss: float, speed: float, task=task) -> None:
                rate = run.schedule.get_last_lr()[0]
                progress.update(task, completed=step, loss=loss, rate=rate, speed=speed)

            progress.update(task, completed=first)
            run.finish_epoch(run.train_epoch(show))
    console.print(_table(run.history))


def _table(history: Sequence[dict]) -> Table:
    table = Table(*(history[0] if history else ()))
    for row in history:
        table.add_row(*(f"{value:.4g}" for value in row.values()))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", type=Path, help="folder with train/CLASS/* and val/CLASS/*")
    add("--model", default="resnet18", help="of torchvision; default: %(default)s")
    add("--blocks", choices=("fused", "eager"), default="fused", help="default: %(default)s")
    add("--precision", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("imagefolder-run"), help="default: %(default)s")
    add("--resume", action="store_true", help="go on from --out's checkpoint, if there is one")
    add("--save-every", type=int, default=0, metavar="STEPS", help="besides each epoch's end")
    add("--epochs", type=int, default=5, help="default: %(default)s")
    add("--batch", type=int, default=64, help="of all processes together; default: %(default)s")
    add("--size", type=int, default=64, help="pixels of a side; default: %(default)s")
    add("--rate", type=float, default=0.01, help="learning rate; default: %(default)s")
    add("--warmup", type=int, default=1, metavar="EPOCHS", help="default: %(default)s")
    add("--weight-decay", type=float, default=5e-4, help="default: %(default)s")
    add("--smoothing", type=float, default=0.1, help="of labels; default: %(default)s")
    add("--ema-decay", type=float, default=0.9, help="of the averaged weights; default: %(default)s")
    add("--sync-bn", action="store_true", help="statistics over all processes")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=0, help="processes that read images; default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
