"""What each process of a distributed test does; writes what it found to a file of its rank."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from twins import fell_back, is_fused, operands, twins

import resfuse


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


def main() -> None:
    folder, rank, size, what, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(rank), world_size=int(size))
    torch.save(globals()[what](*arguments), Path(folder) / f"found{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
