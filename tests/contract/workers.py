"""What each process of a distributed test does; writes what it found to a file of its rank."""

import copy
import gc
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from twins import fell_back, is_fused, operands, step, twins

import resfuse
from resfuse.testing.models import small_resnet


def data(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of this rank alone."""
    x, dout = (t.detach() for t in operands(name))
    return x + 0.1 * dist.get_rank(), dout


def gradients(model: nn.Module, steps: list) -> dict[str, torch.Tensor]:
    for x, dout, context in steps:
        with context():
            model(x).backward(dout)
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()}


def ddp(name: str, order: str, how: str) -> list[dict[str, torch.Tensor]]:
    """[ours, eager's] gradients. order: whether fuse comes before or after; how: what else DDP is asked to do."""
    eager, fused = twins(name)
    settings = {"static_graph": True} if how == "static_graph" else {}
    models = [
        DistributedDataParallel(fused if order == "before" else copy.deepcopy(eager), **settings),
        DistributedDataParallel(eager, **settings),
    ]
    if order == "after":
        resfuse.fuse(models[0].module)
    found = []
    for model in models:
        x, dout = data(name)
        once = (x, dout, torch.enable_grad)
        found.append(gradients(model, [(x, dout, model.no_sync), once] if how == "accumulation" else [once]))
    assert isinstance(models[0].module, resfuse.blocks.mixin.FusedMixin)
    return found


def fsdp(name: str) -> list[dict[str, torch.Tensor]]:
    from torch.distributed.fsdp import fully_shard

    found = []
    for block in reversed(twins(name)):
        block.to(memory_format=torch.contiguous_format)  # FSDP takes no other parameters
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(block, mesh=mesh)
        x, dout = data(name)
        block(x).backward(dout)
        if not found:  # ours comes first
            assert is_fused(block) and not fell_back(block), fell_back(block)
        found.append({n: p.grad.full_tensor() for n, p in block.named_parameters()})
    return found


def sync(dtype: str, *names: str) -> list[dict[str, torch.Tensor]]:
    """[ours, of the whole batch in one process, ours, ...] of each block. The batch is split unevenly; the last process
    has none of it, and does what torch.nn.SyncBatchNorm does then. Parameters' gradients are added up."""
    found, rank, size, dtype = [], dist.get_rank(), dist.get_world_size(), getattr(torch, dtype)
    for i, name in enumerate(names):
        eager, ours = (block.to(dtype) for block in twins(name))
        if i % 2:
            ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
        else:
            ours = resfuse.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(eager)))
        whole = [torch.cat([t.detach(), t.detach().flip(3)]) for t in operands(name, dtype)]
        expected = step(eager, *whole)
        sizes = [1] * (size - 2) + [len(whole[0]) - size + 2, 0]
        parts = [t.split(sizes)[rank] for t in whole]
        if sizes[rank]:
            made = step(ours, *parts)
            assert not fell_back(ours), fell_back(ours)
            made = {n: t for n, t in made.items() if n in expected}
        else:
            norms = [m for m in ours.modules() if isinstance(m, nn.SyncBatchNorm)]
            for norm in norms:  # what it sends
                sent = torch.zeros(2 * norm.num_features + 1, dtype=dtype)
                dist.all_gather([torch.empty_like(sent) for _ in range(size)], sent)
            for norm in reversed(norms):
                dist.all_reduce(torch.zeros(2 * norm.num_features, dtype=dtype))
            made = {n: torch.zeros_like(p) for n, p in ((f"d{n}", p) for n, p in ours.named_parameters())}
        for n in sorted(f"d{n}" for n, _ in ours.named_parameters()):
            dist.all_reduce(made[n])
        expected |= {n: expected[n].split(sizes)[rank] for n in ("out", "dx")}
        found += [made, {n: expected[n] for n in made}]
    _second_order_raises(dist.new_group(range(size - 1)), names[0], dtype)
    return found


def _second_order_raises(group: dist.ProcessGroup, name: str, dtype: torch.dtype) -> None:
    """Among some of the processes, which alone share statistics then."""
    if dist.get_rank(group) < 0:
        return
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(twins(name)[1].to(dtype), group)
    x, dout = operands(name, dtype)
    with pytest.raises(RuntimeError, match="gradients of gradients through SyncBatchNorm"):
        torch.autograd.grad(ours(x), x, dout, create_graph=True)


def row() -> tuple[nn.Sequential, nn.Sequential, torch.Tensor]:
    """(eager, a run of the same blocks, this rank's input)."""
    eager = small_resnet(in_channels=3, seed=0).stages
    ours = resfuse.fuse(copy.deepcopy(eager), config=resfuse.FuseConfig(memory="leanest"))
    generator = torch.Generator().manual_seed(dist.get_rank())
    return eager, ours, torch.randn(2, 32, 10, 10, generator=generator).contiguous(memory_format=torch.channels_last)


def trained(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    grads = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
    return {"out": out.detach(), "dx": x.grad, **whole}


def run_ddp() -> list[dict[str, torch.Tensor]]:
    eager, ours, x = row()
    return [trained(DistributedDataParallel(model), x) for model in (ours, eager)]


def run_fsdp() -> list[dict[str, torch.Tensor]]:
    from torch.distributed.fsdp import fully_shard

    found = []
    eager, ours, x = row()
    for model in (ours, eager):
        model.to(memory_format=torch.contiguous_format)
        for block in model[1:3]:
            fully_shard(block, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
        found.append(trained(model, x))
    assert [(code, count) for _, code, _, count in resfuse.report(ours).splits] == [("inner_hook", 2)]
    return found


def run_sync() -> list[dict[str, torch.Tensor]]:
    """[run's, of the same blocks one by one]: torch's own SyncBatchNorm does not train on a CPU."""
    eager, _, x = row()
    eager = nn.SyncBatchNorm.convert_sync_batchnorm(eager)
    models = [resfuse.fuse(copy.deepcopy(eager), config=resfuse.FuseConfig(memory=m)) for m in ("leanest", "balanced")]
    found = [trained(model, x) | {n: b.clone() for n, b in model.named_buffers()} for model in models]
    assert resfuse.report(models[0]).splits == [] and not fell_back(models[0])
    return found


def main() -> None:
    folder, rank, size, what, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(rank), world_size=int(size))
    torch.save(globals()[what](*arguments), Path(folder) / f"found{rank}.pt")
    gc.collect()  # who holds the group would keep its threads beyond the interpreter's end
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
