"""The contract of every kernel set: operands, primitives, promises.

A kernel set is a package with one module per primitive; each module defines a function of the same name. A set
may lack primitives and may refuse operands by raising `Unsupported` before it has done anything; dispatch then
asks the next set. Kernel sets know nothing of autograd, autocast or modules.

Conventions
    Activations and their gradients are 4-d tensors [N, C, H, W], dense in channels_last, or all contiguous (NCHW),
    which a set may refuse; read as a matrix they have M = N*H*W rows of C channels. An operand that is only read may
    be a strided view (every s-th pixel): a tensor's own strides are its geometry. Results have the operands' layout.
    Storage dtype: float64, float32, bfloat16 or float16; "wide" is the accumulation dtype: float64 for float64
    storage, float32 for the others. Per-channel vectors and statistics are wide. Weights come in the storage dtype
    unless a primitive says otherwise.
    Summation order is fixed: the same operands give the same bits (on a CPU for a given number of threads), but for
    the vendor's convolutions, which promise it only under `torch.use_deterministic_algorithms`, and products, which are
    alike on GPUs of one kind.
    NaN and inf behave as in torch: ReLU keeps NaN, a masked-out gradient is 0 whatever it was. But a convolution of an
    image's few channels may be NaN one pixel beyond the windows that hold such a value.
    A primitive never writes to its operands; `update_running` alone writes, to the buffers it is given.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Reason(NamedTuple):
    """Why a kernel set, a block or a call is not served: a stable code and a sentence."""

    code: str
    text: str


class Unsupported(NotImplementedError):
    """Raised by a primitive that cannot serve its operands, before anything has run."""

    def __init__(self, reasons: Sequence[Reason]):
        self.reasons = tuple(reasons)
        super().__init__("; ".join(f"{r.code}: {r.text}" for r in self.reasons))


class Native(NamedTuple):
    """A launch as a driver takes it. Several in a row are made by batch([(*launch, parameters), ...]), which is called
    with the current stream's address and those of memory: a parameter is the bytes of a constant or, where here a
    tensor is, (index of an address, offset in bytes)."""

    batch: Callable[[list[tuple]], Callable[..., None]]
    launch: tuple
    parameters: tuple[bytes | Tensor, ...]


class Started(NamedTuple):
    """How a kernel that is no operator of torch's dispatcher is started again: function(*fixed, *operands), with the
    current stream's address for STREAM and, where `addresses`, those of the operands' memory for them. native: the same
    where it can be one of a batch."""

    function: Callable
    fixed: tuple
    operands: tuple
    addresses: bool
    native: Native | None = None


class _Listening(threading.local):
    """started: who is told of such kernels in this thread; it starts them."""

    started: Callable[[Callable[[], Started]], None] | None = None


STREAM = object()
listening = _Listening()

# Operands ----------------------------------------------------------------------------------------------------


class Activation(NamedTuple):
    """What follows a BatchNorm where that is not ReLU, as torch has it, of a value v:

        leaky_relu   v where v > 0 else slope * v
        relu6        min(max(v, 0), 6)
        silu         v / (1 + exp(-v))
        hardswish    v * min(max(v + 3, 0), 6) / 6
    """

    kind: str
    slope: float = 0.0


ACTIVATIONS = ("leaky_relu", "relu6", "silu", "hardswish")  # kernels take the place here for the name


class Norm(NamedTuple):
    """The activation `act(scale * z + shift)`, rounded to z's dtype. z [N, C, H, W]; scale, shift wide [C].

    y: the same as a tensor, where a set's `prepare` has made it for products to read. act: what follows instead of
    ReLU; `bn_act` and `bn_act_backward` are given such recipes and, where a set has ANY_ACTIVATION, its depthwise
    convolutions.
    """

    z: Tensor
    scale: Tensor
    shift: Tensor
    relu: bool = True
    y: Tensor | None = None
    act: Activation | None = None


class Second(NamedTuple):
    """A second 1x1 convolution added to the first one's output: `scale * (x @ weight.T) + shift`, never stored.

    x [N, C, H, W] or its recipe (a strided view where the shortcut has a stride), weight [K, C] in storage dtype,
    scale and shift wide [K].
    """

    x: Tensor | Norm
    weight: Tensor
    scale: Tensor
    shift: Tensor


class Padded(NamedTuple):
    """x [N, C, H, W] with channels of zeros around it: `before` of them first, `channels` in all, never stored."""

    x: Tensor
    before: int
    channels: int


class Masked(NamedTuple):
    """The gradient `scale * row_scale[n] * (dout where mask else 0)`, what is None left out.

    dout [N, K, H, W]; mask uint8 [M, ceil(K/8)], channel 8i+j is bit j; row_scale wide [N], a factor per sample.
    """

    dout: Tensor
    mask: Tensor | None
    row_scale: Tensor | None = None
    scale: float = 1.0


class BNGrad(NamedTuple):
    """BatchNorm's input gradient `scale * (dy - mean_dy - (z - mean) * slope)`, not yet computed.

    slope = invstd^2 * mean(dy * (z - mean)). Where the statistics are constants (frozen), mean_dy and slope are None
    and the gradient is `scale * dy`, whatever z is.
    shift: dy is still to be masked by relu(scale * z + shift); None: it is that gradient already.
    """

    dy: Tensor | Masked
    z: Tensor
    mean: Tensor
    scale: Tensor
    mean_dy: Tensor | None
    slope: Tensor | None
    shift: Tensor | None = None


class Summed(NamedTuple):
    """A gradient dy [N, C, H, W] below the ReLU of relu(bn(z)), with BatchNorm's sums of parts of its rows: sum(dy) and
    sum(dy * (z - mean)), wide [parts, 2, C], to be added in order."""

    dy: Tensor
    sums: Tensor


class Strided(NamedTuple):
    """A gradient known only at every stride-th pixel of its tensor (height, width); zero elsewhere."""

    compact: Tensor
    stride: tuple[int, int]


Act = Tensor | Norm
Grad = Tensor | Masked | BNGrad
Residual = Tensor | Norm | Second | Padded | None
Addend = Tensor | Masked | Strided | None


class Sum(NamedTuple):
    """A block's last step: what is added to its main branch, how the two are weighed, and what follows.

        act(scale * (row_scale[n] * main + residual))                  without a gate
        act(scale * (gate * row_scale[n] * main + (1 - gate) * residual))

    row_scale wide [N], a factor per sample (stochastic depth); gate [N, K, H, W] in storage dtype (highway). What is
    None is left out. Everything acts on wide values; the sum is rounded once.
    """

    residual: Residual = None
    relu: bool = True
    scale: float = 1.0
    row_scale: Tensor | None = None
    gate: Tensor | None = None


class Want(NamedTuple):
    """What the primitive that writes a sum gives besides: its mask `not (out <= 0)`, its statistics."""

    mask: bool = False
    stats: bool = False


class Geometry(NamedTuple):
    """A convolution's geometry, each pair (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def spatial(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Output pixels (height, width) of an input's, for a kernel of that size; below 1 where none fits."""
        sides = zip(size, kernel, *self[:3], strict=True)
        return tuple((side + 2 * pad - spread * (k - 1) - 1) // step + 1 for side, k, step, pad, spread in sides)


class Window(NamedTuple):
    """A pooling window, each pair (height, width); ceil_mode as in torch."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    def spatial(self, size: Sequence[int]) -> tuple[int, int]:
        """Output pixels (height, width) of an input's, as torch has them."""
        found = []
        for side, k, step, pad, spread in zip(size, *self[:4], strict=True):
            reach = side + 2 * pad - spread * (k - 1) - 1
            count = (-(-reach // step) if self.ceil_mode else reach // step) + 1
            if self.ceil_mode and (count - 1) * step >= side + pad:
                count -= 1  # a window must begin inside the input or its left padding
            found.append(count)
        return tuple(found)


class Stats(NamedTuple):
    """Batch statistics of M values a channel: mean and biased variance, wide [C]."""

    mean: Tensor
    var: Tensor


class Affine(NamedTuple):
    """BatchNorm as one affine map: scale = gamma * invstd, shift = beta - mean * scale; wide [C]."""

    scale: Tensor
    shift: Tensor
    invstd: Tensor


class Written(NamedTuple):
    """A sum as it was stored: out [N, K, H, W] in storage dtype, and what was wanted of it.

    stats None, though wanted: they would be a pass of their own, which is the caller's to ask for (`bn_stats`).
    """

    out: Tensor
    mask: Tensor | None = None
    stats: Stats | None = None


class BNContext(NamedTuple):
    """What BatchNorm's backward needs of its forward, [C]; `batch` False where the statistics were constants."""

    mean: Tensor
    invstd: Tensor
    gamma: Tensor | None
    batch: bool


class RunningUpdate(NamedTuple):
    """One BatchNorm's pending update: statistics of `count` values a channel, its buffers and momentum.

    momentum None takes the cumulative average, 1 / num_batches_tracked after its increment.
    """

    stats: Stats
    count: int
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None


# Primitives --------------------------------------------------------------------------------------------------


class KernelSet(Protocol):
    """Every primitive. `docs/math.md` has the algebra; the names here are its names."""

    def prepare(self, operand: Act | Grad, outer: int = 0) -> Act | Grad:
        """The operand as this set reads it best when several primitives read it in turn.

        outer: channels of the products that are about to read it, 0 where that is not known. A set whose kernels apply
        recipes in their prologue returns it unchanged, or a `Norm` with its y; a set that would compute the recipe at
        every use returns the tensor, once. `prepare` of a Tensor is that tensor, or of a strided view a dense copy.
        """

    def bn_stats(self, z: Tensor) -> Stats:
        """Mean and biased variance of each channel over N, H, W. Reads z once."""

    def finalize(self, stats: Stats, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Affine:
        """Fold BatchNorm into one affine map, in wide precision. Missing gamma is 1, missing beta 0."""

    def conv_stats(self, a: Act, weight: Tensor, geometry: Geometry, stats: bool) -> tuple[Tensor, Stats | None]:
        """Any convolution without bias: raw output z [N, K, P, Q] in storage dtype and, if asked, its statistics.

        Padding is zero after the activation. weight [K, C/groups, R, S].
        """

    def covariance(self, a: Act) -> tuple[Tensor, Tensor]:
        """Mean [C] and biased covariance [C, C] of the rows, wide, of the values as a product would read them."""

    def expand_stats(self, weight: Tensor, mean: Tensor, cov: Tensor) -> Stats:
        """Statistics of `a @ weight.T` from those of a: W @ mean and rowsum((W @ cov) * W), clamped at 0.

        weight [K, C] in storage dtype; the products are wide whatever the tf32 switches say.
        """

    def expand(self, a: Act, weight: Tensor, scale: Tensor, shift: Tensor, total: Sum, want: Want) -> Written:
        """The sum whose main branch is `scale * (a @ weight.T) + shift`.

        a [N, C, H, W] or its recipe, weight [K, C]; out [N, K, H, W]; scale and shift act on the accumulator.
        """

    def apply(self, a: Norm, total: Sum, want: Want) -> Written:
        """The sum whose main branch is `scale * z + shift`. a.relu is not used here: total.relu acts on the sum."""

    def select(self, grad: Masked) -> Tensor:
        """The recipe's tensor, rounded once."""

    def bn_relu_max_pool(self, a: Norm, window: Window) -> tuple[Tensor, Tensor]:
        """Maxima of a's windows [N, C, P, Q], and where they are: uint8, row * size[1] + column in the window.

        As in torch the first maximum of the rounded values wins, and the last NaN. At most 255 values a window.
        """

    def bn_relu_max_pool_backward(
        self, dout: Tensor, argmax: Tensor, a: Norm, window: Window, context: BNContext
    ) -> tuple[Grad, Tensor, Tensor]:
        """(dz, dgamma, dbeta) of BatchNorm under its ReLU and the pool; dz as in `bn_backward`."""

    def avg_pool(self, a: Act, window: Window, count_include_pad: bool) -> Tensor:
        """Averages of a's windows [N, C, P, Q], rounded once. window.dilation is (1, 1)."""

    def avg_pool_backward(self, dout: Tensor, a: Act, window: Window, count_include_pad: bool) -> Tensor:
        """The gradient of a, whose values do not matter."""

    def update_running(self, updates: Sequence[RunningUpdate]) -> None:
        """Update running mean, unbiased running variance and counters, without a device synchronisation.

        Everything that can fail comes before the first write.
        """

    def scale_weight(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Wg = scale[:, None] * weight, rounded once to storage. weight [K, C]."""

    def expand_products(
        self, g: Grad, a: Act, mean: Tensor | None, wg: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """P = g.T @ (a - mean) [K, C] and sum(g) [K], both wide; and u = g @ wg where it comes in the same pass.

        mean None: the uncentred product (frozen statistics). wg None: u is not wanted. u [N, C, H, W] is wide or in
        storage dtype; a set that has it for free gives it, another leaves it (None) to `expand_dgrad`.
        """

    def expand_coefficients(
        self, products: Tensor, sum_g: Tensor, weight: Tensor, wg: Tensor, mean: Tensor, cov: Tensor,
        affine: Affine, count: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The C-length and [K, C] algebra of the backward pass, batch statistics.

        dgamma = invstd * rowsum(P * W) [K]; dweight = scale * (P - dgamma * invstd * (W @ cov)) [K, C];
        Q = W.T @ diag(scale * invstd * dgamma / M) @ W [C, C] = q_scale * q, q rounded to storage and its largest
        entry between 1 and 2 (Q is smaller than the gradient by a factor of M, and would underflow in float16),
        q_scale a power of two, wide, 0-d; c = (sum_g / M) @ Wg - mean @ Q [C], wide, from the rounded Wg and q.
        Returns dgamma, dweight, q, q_scale, c.
        """

    def expand_dgrad(
        self, g: Grad, u: Tensor | None, a: Act, wg: Tensor,
        q: Tensor | None, q_scale: Tensor | None, c: Tensor | None, relu: bool, mean: Tensor | None,
    ) -> Tensor | Summed:
        """da = g @ Wg - q_scale * (a @ q) - c [N, C, H, W], rounded once; masked by a's ReLU where `relu`.

        u, if given, stands for g @ Wg. q, q_scale and c are None for constant statistics. mean: that of the BatchNorm
        under a's ReLU, whose sums are wanted next; a set that has them in the same pass gives da as `Summed`.
        """

    def bn_reduce(self, dy: Tensor | Masked, z: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
        """dbeta = sum(dy) and dgamma = invstd * sum(dy * (z - mean)), wide [C]."""

    def bn_dgrad(self, grad: BNGrad) -> Tensor:
        """The recipe's tensor, rounded once."""

    def bn_backward(
        self, dy: Grad | Summed, a: Act | None, z: Tensor, context: BNContext
    ) -> tuple[Grad, Tensor, Tensor]:
        """(dz, dgamma, dbeta) of BatchNorm, after the ReLU that made `a` if a is given.

        a: this BatchNorm's own activation, Norm(z, scale, shift) with its scale and shift, or that as a tensor.

        dz may be the `BNGrad` recipe (the consumer computes it in its prologue) or a tensor (one pass gave all).
        """

    def bn_act(self, a: Norm) -> Tensor:
        """The recipe of an activation other than ReLU as a tensor, rounded once."""

    def bn_act_backward(self, dy: Tensor, a: Norm, context: BNContext) -> tuple[Tensor, Tensor, Tensor]:
        """(dz, dgamma, dbeta) from the gradient dy of `bn_act`: BatchNorm's backward of dy * act'(scale * z + shift),
        which is wide and nowhere written; a.scale is BatchNorm's own. dz is rounded once."""

    def conv_backward(
        self, grad: Grad, a: Act, weight: Tensor, geometry: Geometry, add: Addend, needs: tuple[bool, bool],
        mean: Tensor | None = None,
    ) -> tuple[Tensor | Summed | None, Tensor | None]:
        """(da + add, dweight) of a convolution, each None if not needed. da in storage, dweight wide or storage.

        `add` is the other path's gradient into the same activation (the shortcut's). mean: that of the BatchNorm under
        a's ReLU, where there is no addend; a set that can in the same pass masks da by the ReLU and gives `Summed`.
        """


PRIMITIVES = tuple(name for name in vars(KernelSet) if not name.startswith("_"))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The accumulation dtype of a storage dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
