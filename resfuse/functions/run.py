"""Residual blocks in a row as one Function, which keeps less than they do one by one.

    x_1 = x    x_(i+1) = block_i(x_i)    out = x_(n+1)

Kept for backward: x and, of each block, what its own Function keeps (`block.py`) but for its input, its mask and,
where that is asked for, the first convolution's raw output. Of the last block the mask is kept: its output is not
needed otherwise. Backward makes the inputs x_2 .. x_n and their masks again, in the order of forward, which takes each
block's last step alone; then the first convolutions' outputs, each before its block's own backward.

What is made again is made by the primitives that made it, from the same operands, with the batch statistics as they
were: it is the same bits, and no buffer, counter or generator is touched a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.interface import Stats
from . import block, composite, sync
from . import unit as units
from .block import Made, Saved
from .branches import Inputs, Spec
from .unit import KEEP


class RunSpec(NamedTuple):
    """What is static in one call. leanest: whether raw outputs of first convolutions that are 1x1 are dropped too."""

    blocks: tuple[Spec, ...]
    leanest: bool


class RunFunction(torch.autograd.Function):
    """apply(run, *the `Inputs` of the first block, *those of the second, ...) -> as `BlockFunction` of the last block.

    The input of every block but the first is None there, and so are the statistics of it; no block has a given residual
    or a gate. The caller makes the updates in each block's pending.
    """

    @staticmethod
    def forward(ctx, run: RunSpec, *flat: Tensor | None):
        each, held = list(_each(flat, map(Inputs.count, run.blocks))), []
        x, own = each[0][0], each[0][1:3]
        for i, (spec, its) in enumerate(zip(run.blocks, each, strict=True)):
            its = [x, *own, *its[3:]]
            made, inputs = spec.steps.forward(spec, its), Inputs.arrange(spec, its)
            read = (*inputs.norm, *inputs.units, *inputs.shortcut)
            spec.pending.extend(units.running_updates(spec.running, made.stats, read))
            held.append(_held(run, i, made, inputs))
            x, own = made.out, made.own
            if i + 1 < len(run.blocks):
                own = _handed_on(own, run.blocks[i + 1])
            del its, made, inputs  # which hold what nobody needs any more
        each[0] = [each[0][0], None, None, *each[0][3:]]
        ctx.save_for_backward(*(t for its in (*each, *(saved.flat() for saved in held)) for t in its))
        ctx.run, ctx.held = run, [len(saved.flat()) for saved in held]
        if own is None:
            return x
        ctx.mark_non_differentiable(*own)
        return x, *own

    @staticmethod
    def backward(ctx, dout: Tensor, *_):
        blocks = ctx.run.blocks
        counts = [*map(Inputs.count, blocks), *ctx.held]
        found = list(_each(ctx.saved_tensors, counts))  # read once: hooks may recompute them
        each, held = found[: len(blocks)], found[len(blocks) :]
        if torch.is_grad_enabled():  # create_graph: these gradients will be differentiated
            return None, *_differentiable(blocks, each, dout)
        return None, *_backward(blocks, each, held, dout, list(_each(ctx.needs_input_grad[1:], counts[: len(blocks)])))


def drops_first(spec: Spec, inputs: Inputs) -> bool:
    """Whether the first convolution's raw output can be made again by a 1x1, and is kept for its own sake."""
    return len(spec.units) > 1 and spec.units[0].form == KEEP and units.is_pointwise(spec.units[0], inputs.units[0])


def _held(run: RunSpec, i: int, made: Made, inputs: Inputs) -> Saved:
    """What is kept of block i."""
    zs, mask = made.saved.zs, made.saved.mask
    if run.leanest and drops_first(run.blocks[i], inputs):
        zs = (None, *zs[1:])
    return made.saved._replace(zs=zs, mask=mask if i + 1 == len(run.blocks) else None)


def _handed_on(own: Stats | None, following: Spec) -> Sequence[Tensor | None]:
    """The statistics of a block's output, where the next one's BatchNorm is about to ask for them."""
    asks = following.norm is not None and following.norm.batch
    return own if own is not None and asks else (None, None)


def _backward(
    blocks: Sequence[Spec], each: list[Sequence], held: list[Sequence], dout: Tensor, needs: Sequence[Sequence[bool]]
) -> list[Tensor | None]:
    """Gradients of each block's `Inputs`, as far as they are needed."""
    lowest = next((i for i, its in enumerate(needs) if any(its)), len(blocks))
    xs = [each[0][0]]
    for i, spec in enumerate(blocks[:-1]):
        out, mask = block.again(spec, [xs[-1], *each[i][1:]], held[i])
        xs.append(out)
        held[i] = Saved.arrange(spec, held[i])._replace(mask=mask).flat()
    found: list[Tensor | None] = []
    for i in reversed(range(lowest, len(blocks))):
        spec, its, saved = blocks[i], [xs.pop(), *each[i][1:]], held.pop()
        if spec.units[0].form == KEEP and saved[0] is None:
            saved = [block.first_again(spec, its, saved), *saved[1:]]
        wanted = [needs[i][0] or i > lowest, *needs[i][1:]]
        gradients = spec.steps.backward(spec, its, saved, dout, wanted)
        del its, saved  # before the next block's are made
        dout = gradients[0]
        found[:0] = gradients if i == 0 else [None, *gradients[1:]]
    return [None] * sum(map(Inputs.count, blocks[:lowest])) + found


def _differentiable(blocks: Sequence[Spec], each: Sequence[Sequence], dout: Tensor) -> list[Tensor | None]:
    """The same gradients, connected to what they were made of."""
    out = each[0][0]
    with torch.autocast(dout.device.type, enabled=False):
        for spec, its in zip(blocks, each, strict=True):
            sync.check_first_order(spec)
            out = composite.block(spec, Inputs.arrange(spec, [out, *its[1:]]), None)
        return composite.input_gradients(out, dout, [t for its in each for t in its])


def _each(flat: Sequence, counts) -> Iterator[Sequence]:
    """The pieces of a sequence, so many in each."""
    start = 0
    for count in counts:
        yield flat[start : start + count]
        start += count
