"""Residual blocks in a row, a Function for each, which together keep less than they do one by one.

    x_1 = x    x_(i+1) = block_i(x_i)    out = x_(n+1)

Kept for backward: x and, of each block, what its own Function keeps (`block.py`) but for its input, its mask and,
where that is asked for, the first convolution's raw output. Of the last block the mask is kept: its output is not
needed otherwise. Backward makes the inputs x_2 .. x_n and their masks again, in the order of forward, which takes each
block's last step alone; then the first convolutions' outputs, each before its block's own backward.

What is made again is made by the primitives that made it, from the same operands, with the batch statistics as they
were: it is the same bits, and no buffer, counter or generator is touched a second time.

The last block's Function holds everything until its backward, which comes first, makes the inputs again and leaves each
block what it needs. So gradients of parameters leave block by block, and what a block has read is freed with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import block, composite, sync
from . import unit as units
from .block import Made, Saved
from .branches import Inputs, Spec
from .unit import KEEP


class Run:
    """What the Functions of one run share. leanest: whether raw outputs of first convolutions that are 1x1 are dropped
    too; noted: in forward, what is to be kept of the blocks so far; left: in backward, what is left to those before."""

    def __init__(self, length: int, leanest: bool):
        self.length, self.leanest = length, leanest
        self.noted: list[Block] = []
        self.left: list[Block] = []
        self.versions: list[list[int]] = []  # of what is left, as torch notes them of what is saved


class Block(NamedTuple):
    """inputs: in the order of `Inputs`, but for the first block without its input; saved: in the order of `Saved.flat`,
    without what backward makes again."""

    spec: Spec
    inputs: Sequence[Tensor | None]
    saved: Sequence[Tensor | None]


class RunFunction(torch.autograd.Function):
    """apply(run, spec, *the block's `Inputs`) -> as `BlockFunction`, for each block of the run in turn.

    No block has a given residual or a gate. The caller makes the updates in each spec's pending, and uses no output but
    the last block's otherwise.
    """

    @staticmethod
    def forward(ctx, run: Run, spec: Spec, *flat: Tensor | None):
        made, inputs = spec.steps.forward(spec, flat), Inputs.arrange(spec, flat)
        first, ctx.last = len(run.noted) == 0, len(run.noted) + 1 == run.length
        kept = inputs._replace(parts=inputs.parts if first else (None,), mean=None, var=None)
        run.noted.append(Block(spec, kept.flat(), _held(run, ctx.last, spec, inputs, made).flat()))
        ctx.run, ctx.spec = run, spec
        if ctx.last:
            ctx.save_for_backward(*(t for _, *kept in run.noted for part in kept for t in part))
            ctx.counts = [(spec, len(inputs), len(saved)) for spec, inputs, saved in run.noted]
            run.noted = []
        return block.returned(ctx, spec, inputs, made)

    @staticmethod
    def backward(ctx, dout: Tensor, *_):
        differentiable = torch.is_grad_enabled()  # create_graph: these gradients will be differentiated
        if ctx.last:
            blocks = list(_blocks(ctx.saved_tensors, ctx.counts))  # read once: hooks may recompute them
            ctx.run.left = _followed(blocks) if differentiable else _made_again(blocks)
            ctx.run.versions = [_versions(left) for left in ctx.run.left]
        spec, inputs, saved = left = ctx.run.left.pop()
        if _versions(left) != ctx.run.versions.pop():
            raise RuntimeError(
                "an input or a parameter of a block was modified by an inplace operation after the backward of a later "
                "block of its run had begun: its gradients cannot be computed"
            )
        needs = ctx.needs_input_grad[2:]
        if not needs[0]:  # nobody before is going to ask
            ctx.run.left, ctx.run.versions = [], []
        if differentiable:
            sync.check_first_order(spec)
            with torch.autocast(dout.device.type, enabled=False):
                arranged = Inputs.arrange(spec, inputs), Inputs.arrange(spec, needs)
                return None, None, *composite.gradients(spec, *arranged, dout, None)
        if spec.units[0].form == KEEP and saved[0] is None:
            saved = [block.first_again(spec, inputs, saved), *saved[1:]]
        return None, None, *spec.steps.backward(spec, inputs, saved, dout, needs)


def _versions(left: Block) -> list[int]:
    return [t._version for t in (*left.inputs, *left.saved) if t is not None]


def _held(run: Run, last: bool, spec: Spec, inputs: Inputs, made: Made) -> Saved:
    """What is kept of a block."""
    zs, mask = made.saved.zs, made.saved.mask
    if run.leanest and drops_first(spec, inputs):
        zs = (None, *zs[1:])
    return made.saved._replace(zs=zs, mask=mask if last else None)


def drops_first(spec: Spec, inputs: Inputs) -> bool:
    """Whether the first convolution's raw output is kept for the block's own backward alone, since its output is made
    again without it, and a 1x1 can make it again."""
    first, count = spec.units[0], len(spec.units)
    alone = count > 2 or (count == 2 and spec.units[1].form == KEEP)
    return alone and first.form == KEEP and units.is_pointwise(first, inputs.units[0])


def _made_again(blocks: list[Block]) -> list[Block]:
    """The blocks with their inputs and masks."""
    found = blocks[:1]
    for following in blocks[1:]:
        spec, inputs, saved = found[-1]
        out, mask = block.again(spec, inputs, saved)
        found[-1] = Block(spec, inputs, Saved.arrange(spec, saved)._replace(mask=mask).flat())
        found.append(following._replace(inputs=[out, *following.inputs[1:]]))
    return found


def _followed(blocks: list[Block]) -> list[Block]:
    """The blocks with their inputs, connected to what those were made of."""
    found = blocks[:1]
    for following in blocks[1:]:
        spec, inputs, _ = found[-1]
        with torch.autocast(inputs[0].device.type, enabled=False):
            out = composite.block(spec, Inputs.arrange(spec, inputs), None)
        found.append(following._replace(inputs=[out, *following.inputs[1:]]))
    return found


def _blocks(flat: Sequence[Tensor | None], counts: Sequence[tuple[Spec, int, int]]) -> Iterator[Block]:
    """What was kept, taken apart again."""
    start = 0
    for spec, inputs, saved in counts:
        middle, end = start + inputs, start + inputs + saved
        yield Block(spec, flat[start:middle], flat[middle:end])
        start = end
