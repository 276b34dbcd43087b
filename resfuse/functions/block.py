"""Every residual block in one Function: chains, post-activation and pre-activation blocks, dense layers.

    first = x, or relu(bn(x)) where a norm comes before the first convolution (pre-activation)
    main  = the chain of convolutions from there
    out   = the sum of main and a shortcut, activated or not

Kept for backward: x (the block before wrote it), the raw outputs of the inner convolutions and, where out is rectified
and cannot be told again from them, one bit for each of its values. `docs/math.md` derives each line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.interface import Act, BNContext, BNGrad, Masked, Norm, Stats, Want, Written, wide
from . import branches, chain, composite, replay, sync
from . import unit as units
from .branches import GIVEN, IDENTITY, NOTHING, PADDED, PROJECTION, Inputs, Spec, Steps
from .unit import KEEP, NONE, Gradients, Kept, Tensors


class Saved(NamedTuple):
    """What backward reads beside the arguments. mask uint8 [M, ceil(K/8)]; kept: for norm, units and shortcut."""

    zs: tuple[Tensor, ...]
    shortcut_z: Tensor | None
    mask: Tensor | None
    kept: tuple[Kept, ...]

    def flat(self) -> list[Tensor | None]:
        return [*self.zs, self.shortcut_z, self.mask, *(t for unit in self.kept for t in unit)]

    @classmethod
    def arrange(cls, spec: Spec, flat: Sequence) -> Saved:
        units_of = (*spec.units, *([] if spec.shortcut.unit is None else [spec.shortcut.unit]))
        zs, (shortcut_z, mask, *kept) = branches.split(flat, sum(unit.form == KEEP for unit in spec.units))
        assert len(kept) == len(Kept._fields) * (len(units_of) + (spec.norm is not None))
        return cls(tuple(zs), shortcut_z, mask, branches.grouped(kept, Kept))


class Made(NamedTuple):
    """What forward made. own: the statistics of out, where wanted; saved: None where nothing will be differentiated;
    stats: of each BatchNorm, None for constant ones, in the order of `Saved.kept`."""

    out: Tensor
    own: Stats | None
    saved: Saved | None
    stats: tuple[Stats | None, ...]


class BlockFunction(torch.autograd.Function):
    """apply(spec, *tensors in the order of `Inputs`) -> out, or (out, mean, var) where spec.want_stats; the caller then
    makes the updates in spec.pending.

    Inputs are in storage dtype, of any strides. Weights may be of another dtype (autocast): they are cast here, and
    their gradients come in their own.
    """

    @staticmethod
    def forward(ctx, spec: Spec, *flat: Tensor | None):
        made, inputs = spec.steps.forward(spec, flat), Inputs.arrange(spec, flat)
        if spec.differentiable:
            if inputs.gate is None:
                inputs = inputs._replace(residual=None)  # its gradient needs no value of it
            inputs = inputs._replace(mean=None, var=None)
            ctx.save_for_backward(*inputs.flat(), *made.saved.flat())
            ctx.spec, ctx.arguments = spec, len(flat)
        return returned(ctx, spec, inputs, made)

    @staticmethod
    def backward(ctx, dout: Tensor, *_):
        flat, saved = branches.split(ctx.saved_tensors, ctx.arguments)  # read once: hooks may recompute them
        if torch.is_grad_enabled():  # create_graph: these gradients will be differentiated
            sync.check_first_order(ctx.spec)
            return None, *_differentiable(ctx.spec, flat, saved, dout, ctx.needs_input_grad[1:])
        return None, *ctx.spec.steps.backward(ctx.spec, flat, saved, dout, ctx.needs_input_grad[1:])


def returned(ctx, spec: Spec, inputs: Inputs, made: Made) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """What a Function's forward gives; the updates of running buffers wait in spec.pending."""
    read = (*inputs.norm, *inputs.units, *inputs.shortcut)
    spec.pending.extend(units.running_updates(spec.running, made.stats, read))
    if made.own is None:
        return made.out
    ctx.mark_non_differentiable(*made.own)
    return made.out, *made.own


def forward(spec: Spec, flat: Sequence[Tensor | None]) -> Made:
    """flat: in the order of `Inputs`."""
    x = flat[0]
    k = dispatch.kernels(spec.backend, x.device.type, x.dtype)
    return replay.run(k, "block", spec, flat, lambda: _made(k, spec, Inputs.arrange(spec, flat)))


def _made(k, spec: Spec, inputs: Inputs) -> Made:
    x = inputs.parts[0]
    with torch.autocast(x.device.type, enabled=False):
        written, saved, stats = _forward(k, spec, inputs)
        out = written.out.contiguous(memory_format=spec.out_layout)
        own = (written.stats or k.bn_stats(written.out)) if spec.want_stats else None
    return Made(out, own, saved if spec.differentiable else None, stats)


def backward(
    spec: Spec, flat: Sequence[Tensor | None], saved: Sequence[Tensor | None], dout: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of flat, as far as they are needed. saved: in the order of `Saved.flat`."""
    x = flat[0]
    k = dispatch.kernels(spec.backend, x.device.type, x.dtype)

    def call():
        with torch.autocast(x.device.type, enabled=False):
            return _backward(
                k, spec, Inputs.arrange(spec, flat), Saved.arrange(spec, saved), dout, Inputs.arrange(spec, needs)
            )

    return replay.run(k, "block_backward", spec, [*flat, *saved, dout], call, tuple(needs))


def _differentiable(spec: Spec, flat, saved, dout: Tensor, needs) -> list[Tensor | None]:
    """The same gradients, connected to what they were made of."""
    inputs, needs, passes = Inputs.arrange(spec, flat), Inputs.arrange(spec, needs), None
    mask = Saved.arrange(spec, saved).mask
    with torch.autocast(dout.device.type, enabled=False):
        if spec.shortcut.kind == GIVEN and inputs.residual is None and mask is not None:
            k = dispatch.kernels(spec.backend, dout.device.type, dout.dtype)
            passes = k.select(Masked(torch.ones_like(dout), mask))
        return composite.gradients(spec, inputs, needs, dout, passes)


def _forward(k, spec: Spec, inputs: Inputs):
    dtype, norm_stats, norm_kept = inputs.parts[0].dtype, [], []
    first = x = branches.joined(inputs.parts, spec.layout)
    if spec.norm is not None:
        measured = _input_stats(k, spec, inputs, x)
        vectors, measured = units.normalise(k, spec.norm, inputs.norm[0], measured, x[:, 0].numel(), wide(dtype))
        norm_kept, norm_stats = [vectors], [measured]
        first = k.prepare(_normalised(x, vectors))
        x = x if spec.shortcut.kind in (IDENTITY, PADDED) else None
    made = chain.forward(k, spec.units, inputs.units, first, dtype)
    tensors = inputs.shortcut[0] if inputs.shortcut else None
    source = first if spec.shortcut.kind == PROJECTION else x
    residual, shortcut_stats, shortcut_kept = branches.shortcut_forward(
        k, spec.shortcut, tensors, source, inputs.residual, spec.layout
    )
    want = Want(mask=spec.differentiable and mask_needed(spec), stats=spec.want_stats)
    written = _written(k, spec, inputs, made.main, residual, want)
    beside = [(shortcut_stats, shortcut_kept)] if inputs.shortcut else []
    kept = (*norm_kept, *made.kept, *(vectors for _, vectors in beside))
    stats = (*norm_stats, *made.stats, *(measured for measured, _ in beside))
    return written, Saved(made.zs, branches.kept_output(spec.shortcut, residual), written.mask, kept), stats


def _written(k, spec: Spec, inputs: Inputs, main, residual, want: Want) -> Written:
    act = spec.units[-1].act
    if act is None:
        return branches.write(k, main, inputs.total(spec, residual), want)
    return Written(k.bn_act(main._replace(act=act)))


def again(spec: Spec, flat: Sequence[Tensor | None], saved: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """(out, mask) as forward made them, bit by bit, without a convolution that is not 1x1 and without statistics.

    saved: in the order of `Saved.flat`; of its raw outputs the last alone is read, and the mask is not.
    """
    k = dispatch.kernels(spec.backend, flat[0].device.type, flat[0].dtype)

    def call():
        with torch.autocast(flat[0].device.type, enabled=False):
            return _again(k, spec, Inputs.arrange(spec, flat), Saved.arrange(spec, saved))

    return replay.run(k, "block_again", spec, [*flat, *saved], call)


def _again(k, spec: Spec, inputs: Inputs, saved: Saved) -> tuple[Tensor, Tensor | None]:
    norm_kept, kept, shortcut_kept = _kept_by_role(spec, saved.kept)
    first = x = branches.joined(inputs.parts, spec.layout)
    if spec.norm is not None:
        first = k.prepare(_normalised(x, norm_kept))
        x = x if spec.shortcut.kind in (IDENTITY, PADDED) else None
    main = _main_again(k, spec, inputs, saved.zs, kept, first)
    residual = branches.shortcut_again(
        k, spec.shortcut, inputs.shortcut[0] if inputs.shortcut else None, shortcut_kept,
        first if spec.shortcut.kind == PROJECTION else x, inputs.residual, spec.layout, saved.shortcut_z,
    )
    written = _written(k, spec, inputs, main, residual, Want(mask=mask_needed(spec)))
    return written.out.contiguous(memory_format=spec.out_layout), written.mask


def first_again(spec: Spec, flat: Sequence[Tensor | None], saved: Sequence[Tensor | None]) -> Tensor:
    """The first convolution's raw output as forward made it, bit by bit."""
    k = dispatch.kernels(spec.backend, flat[0].device.type, flat[0].dtype)

    def call():
        with torch.autocast(flat[0].device.type, enabled=False):
            inputs = Inputs.arrange(spec, flat)
            first = branches.joined(inputs.parts, spec.layout)
            if spec.norm is not None:
                first = k.prepare(_normalised(first, Saved.arrange(spec, saved).kept[0]))
            return units.raw(k, spec.units[0], inputs.units[0], first)

    return replay.run(k, "block_first_again", spec, [*flat, *saved], call)


def _backward(k, spec: Spec, inputs: Inputs, saved: Saved, dout: Tensor, needs: Inputs) -> tuple:
    dout = dout.contiguous(memory_format=spec.layout)
    norm_kept, kept, shortcut_kept = _kept_by_role(spec, saved.kept)
    needs_x = any(needs.parts)
    needs_first = needs_x or any(any(need) for need in needs.norm)
    x = branches.joined(inputs.parts, spec.layout)
    # A recipe still: wide, and not read before the chain has come down to it.
    first = x if spec.norm is None else _normalised(x, norm_kept)
    tensors = inputs.shortcut[0] if inputs.shortcut else None
    projection = spec.shortcut.kind == PROJECTION

    main = residual = y = None
    if inputs.gate is not None and needs.gate:
        main = _main_again(k, spec, inputs, saved.zs, kept, first)
        residual = branches.shortcut_again(
            k, spec.shortcut, tensors, shortcut_kept, first if projection else x, inputs.residual, spec.layout,
            saved.shortcut_z,
        )
    elif (spec.relu and saved.mask is None) or spec.units[-1].act is not None:
        y = units.activated(k, spec.units[-1], kept[-1], saved.zs[-1])
    g, beside, dgate = branches.sum_backward(k, spec, inputs, dout, saved.mask, main, residual)
    del main, residual

    source = first if projection else x
    add, shortcut_found = branches.shortcut_backward(
        k, spec.shortcut, tensors, shortcut_kept, beside, source, saved.shortcut_z,
        needs_first if projection else needs_x, needs.shortcut[0] if needs.shortcut else None,
    )
    dresidual = None
    if spec.shortcut.kind == GIVEN and needs.residual:
        dresidual = (k.select(beside) if isinstance(beside, Masked) else beside).contiguous(memory_format=spec.layout)
    into_first, into_x = (add, None) if projection or spec.norm is None else (None, add)
    # Gradients are the widest tensors there are: nothing here holds one that has been read for the last time.
    del beside, add, dout
    lower = chain.wanted_below(needs_first, needs.units)
    branch = k, spec.units, inputs.units, kept, saved.zs, first
    *came, found_last = chain.backward_last(*branch, g, y, into_first, lower, needs.units)
    del g, y
    da, first, found = chain.backward_inner(*branch, came, into_first, lower, needs.units)
    found.append(found_last)
    del into_first
    came = [first, da]
    del first, da
    norm_found = None if spec.norm is None else NONE
    if spec.norm is None:
        dx = came.pop()
    elif needs_first:
        dx, norm_found = _norm_backward(k, spec, inputs.norm[0], norm_kept, x, came, needs_x)
        dx = dx if into_x is None else chain.gathered(k, x, dx, into_x)
    del x
    dparts = branches.separated(dx if needs_x else None, inputs.parts, spec.out_layout)
    return branches.gradients(dparts, dresidual, dgate, norm_found, found, shortcut_found)


def mask_needed(spec: Spec) -> bool:
    """Whether backward cannot tell from what it has where out was rectified."""
    return spec.relu and not (spec.shortcut.kind == NOTHING and spec.units[-1].form == KEEP)


def _kept_by_role(spec: Spec, kept: Sequence[Kept]) -> tuple[Kept | None, Sequence[Kept], Kept | None]:
    norm = 1 if spec.norm is not None else 0
    last = norm + len(spec.units)
    return (kept[0] if norm else None), kept[norm:last], (kept[last] if len(kept) > last else None)


def _main_again(k, spec: Spec, inputs: Inputs, zs, kept: Sequence[Kept], first: Act):
    """The main branch's recipe, in backward."""
    last = len(spec.units) - 1
    unit, z = spec.units[last], zs[-1] if spec.units[last].form == KEEP else None
    a = None if unit.form == KEEP else chain.activation(k, spec.units, last, first, zs, kept)
    return units.again(k, unit, inputs.units[last], kept[last], a, z)


# The norm before the first convolution ---------------------------------------------------------------------------


def _input_stats(k, spec: Spec, inputs: Inputs, x: Tensor) -> Stats | None:
    if not spec.norm.batch:
        return None
    return k.bn_stats(x) if inputs.mean is None else Stats(inputs.mean, inputs.var)


def _normalised(x: Tensor, kept: Kept) -> Norm:
    """relu(bn(x))."""
    return Norm(x, kept.scale, kept.shift)


def _norm_backward(
    k, spec: Spec, t: Tensors, kept: Kept, x: Tensor, came: list, onward: bool
) -> tuple[Tensor, Gradients]:
    """came: first and its gradient, which are taken out of the list; onward: as in `unit.backward_norm`."""
    context = BNContext(kept.mean, kept.invstd, t.gamma, units.own_batch(spec.norm))
    dz, dgamma, dbeta = k.bn_backward(came.pop(), came.pop(), x, context)
    if spec.norm.group is not None and onward:
        sums = sync.gradient_sums(dgamma, dbeta, kept.invstd, kept.count, spec.norm.group)
        dz = sync.completed(k, dz, x, kept.mean, kept.scale, *sums)
    dx = k.bn_dgrad(dz) if isinstance(dz, BNGrad) else dz
    return dx, units.gradients(spec.norm, t, kept, None, dgamma, dbeta)


DIRECT = Steps(forward, backward, branches.update_running)
