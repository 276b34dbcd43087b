"""Stateless entry points: the documented contract of each fused block.

Each takes tensors and settings, validates all of them before anything runs, and updates running statistics in place
after its forward has succeeded, as `torch.nn.functional.batch_norm` does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import checkpoint

from .functions import cost
from .functions.bottleneck import BottleneckFunction, Spec
from .functions.unit import Running, Tensors, Unit
from .kernels import dispatch
from .kernels.interface import Geometry, RunningUpdate


class ArgumentError(ValueError, TypeError):
    """An argument that the block does not take; the message names it. Nothing has run."""


# Raised out of a checkpointed recomputation once its tensors are back; a private name, so perhaps not in every torch.
_StopRecomputation = getattr(checkpoint, "_StopRecomputationError", ())
STORAGE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ConvBN(NamedTuple):
    """A convolution and the BatchNorm after it.

    weight [K, C/groups, R, S]; bias, gamma, beta, running_mean, running_var [K] or None; num_batches_tracked a 0-d
    integer tensor or None. training: take the batch's statistics and, where there are buffers, update them.
    Without running statistics the batch's are taken whatever `training` says. momentum None: cumulative average.
    """

    weight: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    eps: float = 1e-5
    momentum: float | None = 0.1
    training: bool = True

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.stride, self.padding, self.dilation, self.groups)

    @property
    def batch(self) -> bool:
        """Whether the batch's own statistics normalise."""
        return self.training or (self.running_mean is None and self.running_var is None)


def bottleneck(
    x: Tensor, conv1: ConvBN, conv2: ConvBN, conv3: ConvBN, shortcut: ConvBN | None = None, *, backend: str = "auto"
) -> Tensor:
    """`relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))`, shortcut None being the identity.

    x [N, C, H, W], float64, float32, bfloat16 or float16, any strides; under autocast it is cast to autocast's dtype,
    and weights always to x's. BatchNorm parameters and buffers are float32 or of x's dtype (float64 for float64).
    Differentiable in x, weights, biases, gammas and betas, to any order (gradients of gradients are not fused). Returns
    [N, K, P, Q] of x's (or autocast's) dtype, channels_last if x or a weight on the main branch is, else contiguous.

    Raises ArgumentError, a ValueError and TypeError, that names the argument; torch's ValueError for one value per
    channel in training; `kernels.interface.Unsupported` if a named backend cannot run it. A call that raises has
    changed no running statistics.
    """
    convs = (conv1, conv2, conv3) if shortcut is None else (conv1, conv2, conv3, shortcut)
    names = ("conv1", "conv2", "conv3", "shortcut")[: len(convs)]
    dtype = _storage_dtype(x)
    sizes = _validate(x, dtype, convs, names)
    pixels = [s[0] * s[2] * s[3] for s in sizes]
    pay = covariance_from(convs)
    unit_list = tuple(
        Unit(c.geometry, c.eps, c.batch, rows is not None and (not c.batch or count >= rows))
        for c, rows, count in zip(convs, pay, pixels, strict=True)
    )
    flat = [t for c in convs for t in _tensors(c)]
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *flat))
    channels_last = any(_suggests_channels_last(t) for t in (x, *(c.weight for c in convs[:3])))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    running = tuple(_running(c, count) for c, count in zip(convs, pixels, strict=True))
    inside = torch.channels_last if x.is_cuda else layout
    spec = Spec(unit_list, running, [], backend, differentiable, inside, layout)
    update_running = dispatch.kernels(backend, x.device.type, dtype).update_running
    try:
        out = BottleneckFunction.apply(spec, x.to(dtype), *flat)
    except _StopRecomputation:  # checkpoint has what it wants; stock BatchNorms have updated by then
        _update(update_running, spec.pending)
        raise
    _update(update_running, spec.pending)
    return out


def covariance_from(convs: tuple[ConvBN, ...]) -> list[int | None]:
    """For each convolution of a bottleneck the rows from which it takes the covariance form; None: never.

    The narrow convolutions, conv1 and conv2, never do: their raw outputs are what the block keeps.
    """
    # Multiply-adds per output row: conv1 makes a row for each pixel that conv2's stride passes over.
    height, width = convs[1].stride
    macs = [convs[0].weight.numel() * height * width, *(c.weight.numel() for c in convs[1:])]
    rows = [None, None]
    for c in convs[2:]:
        out, in_, *kernel = c.weight.shape
        eligible = cost.has_covariance_form(tuple(kernel), c.padding, c.groups, in_, out)
        eligible = eligible and (c is not convs[2] or c.stride == (1, 1))  # BatchNorm 2's gradient wants all of y2's
        rows.append(cost.covariance_rows(in_, out, sum(macs)) if eligible else None)
    return rows


def _suggests_channels_last(t: Tensor) -> bool:
    """Whether a convolution reading t would write channels_last: torch's rule (suggest_memory_format), by strides."""
    size, stride, least = t.shape, t.stride(), 0
    if stride[1] == 0:
        return False
    for d in (1, 3, 2, 0):
        if stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * max(size[d], 1)
    return True


def _tensors(c: ConvBN) -> Tensors:
    """The unit's tensors: running buffers only where they are read."""
    constant = (None, None) if c.batch else (c.running_mean.clone(), c.running_var.clone())  # later steps update them
    return Tensors(c.weight, c.bias, c.gamma, c.beta, *constant)


def _running(c: ConvBN, count: int) -> Running | None:
    """What the batch's statistics update: buffers in training, nothing otherwise."""
    if not c.training or (c.running_mean is None and c.num_batches_tracked is None):
        return None
    return Running(c.running_mean, c.running_var, c.num_batches_tracked, c.momentum, count)


def _update(update_running, pending: list[RunningUpdate]) -> None:
    with torch.no_grad():
        update_running(pending)
    pending.clear()


# Validation --------------------------------------------------------------------------------------------------


def _storage_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the block computes in: autocast's for what autocast casts, else x's."""
    if not isinstance(x, Tensor):
        raise ArgumentError(f"x must be a torch.Tensor, got {type(x).__name__}")
    device = x.device.type
    if device not in ("cpu", "cuda"):
        raise ArgumentError(f"x must be on cpu or cuda, got {x.device}")
    if torch.is_autocast_enabled(device) and x.dtype in STORAGE_DTYPES and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _validate(x: Tensor, dtype: torch.dtype, convs: tuple[ConvBN, ...], names: tuple[str, ...]) -> list[torch.Size]:
    """Every check that does not need a kernel; returns the shape of each convolution's output."""
    if x.dim() != 4:
        raise ArgumentError(f"x must have 4 dimensions [N, C, H, W], got {x.dim()}: {tuple(x.shape)}")
    if x.dtype not in STORAGE_DTYPES:
        raise ArgumentError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.numel() == 0:
        raise ArgumentError(f"x must not be empty, got {tuple(x.shape)}")
    shape, shapes = x.shape, []
    for c, name in zip(convs, names, strict=True):
        shape = _output_shape(x.shape if name == "shortcut" else shape, c, name)
        _check_tensors(x, dtype, c, name)
        shapes.append(shape)
    last, other = shapes[2], shapes[3] if len(shapes) == 4 else x.shape
    if last != other:
        which = "shortcut's output" if len(shapes) == 4 else "x, the identity shortcut,"
        raise ArgumentError(f"conv3's output {tuple(last)} and {which} {tuple(other)} must have the same shape")
    for c, shape in zip(convs, shapes, strict=True):
        if c.batch and shape[0] * shape[2] * shape[3] == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    return shapes


def _output_shape(shape: torch.Size, c: ConvBN, name: str) -> torch.Size:
    weight = c.weight
    if weight.dim() != 4:
        raise ArgumentError(f"{name}.weight must be [K, C/groups, R, S], got {tuple(weight.shape)}")
    if weight.shape[1] * c.groups != shape[1] or weight.shape[0] % c.groups:
        raise ArgumentError(
            f"{name}.weight {tuple(weight.shape)} with groups={c.groups} does not fit an input of {shape[1]} channels"
        )
    spatial = [
        (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
        for size, pad, dil, kernel, step in zip(
            shape[2:], c.padding, c.dilation, weight.shape[2:], c.stride, strict=True
        )
    ]
    if min(spatial) < 1:
        raise ArgumentError(f"{name}: an input of {tuple(shape[2:])} pixels leaves no output ({spatial})")
    return torch.Size((shape[0], weight.shape[0], *spatial))


def _check_tensors(x: Tensor, dtype: torch.dtype, c: ConvBN, name: str) -> None:
    autocast = torch.is_autocast_enabled(x.device.type)
    cast = (dtype,) if dtype == torch.float64 else STORAGE_DTYPES[1:]  # what autocast casts
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for field in ("weight", "bias", "gamma", "beta", "running_mean", "running_var", "num_batches_tracked"):
        t = getattr(c, field)
        if t is None:
            continue
        if t.device != x.device:
            raise ArgumentError(f"{name}.{field} is on {t.device}, x on {x.device}; all must be on one device")
        if field == "num_batches_tracked":
            continue
        if field == "weight":
            accepted = cast if autocast else (dtype,)
        else:
            if t.shape != (c.weight.shape[0],):
                raise ArgumentError(f"{name}.{field} must be [{c.weight.shape[0]}], got {tuple(t.shape)}")
            accepted = cast if autocast and field == "bias" else (dtype, wide)
        if t.dtype not in accepted:
            raise ArgumentError(f"{name}.{field} is {t.dtype}; x in {dtype} takes {' or '.join(map(str, accepted))}")
    if (c.running_mean is None) != (c.running_var is None):
        raise ArgumentError(f"{name}: running_mean and running_var must both be given or both be None")
