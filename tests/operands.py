"""A kernel set's primitives by name, their operands in any dtype, and the same numbers as float64 matrices."""

import importlib

import torch
from units import activation

from resfuse.kernels.interface import BNGrad, Masked, Norm, Second, Sum, Unsupported, Want

DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# What sets leave to the eager one; "vector": buffers that are not float32; "second": a product beside apply.
REFUSALS = {"weighed_second", "second", "dtype", "device", "vector"}


def primitive(name):
    """The set's own, else the eager set's; and the eager set's where the set refuses as it is known to."""
    own, eager = (
        getattr(importlib.import_module(f"resfuse.kernels.{chosen}.{name}"), name)
        if name in importlib.import_module(f"resfuse.kernels.{chosen}").PRIMITIVES else None
        for chosen in (primitive.kernel_set, "eager")
    )

    def call(*args, **kwargs):
        try:
            return own(*args, **kwargs)
        except Unsupported as refusal:
            assert {reason.code for reason in refusal.reasons} <= REFUSALS
            return eager(*args, **kwargs)

    return eager if own is None else call


primitive.kernel_set = "eager"


def tensor(operand):
    """A gradient or activation as a tensor, whether the set prepared it as one or as a recipe."""
    if isinstance(operand, Norm):
        return primitive("apply")(operand, Sum(relu=operand.relu), Want()).out
    if isinstance(operand, BNGrad):
        return primitive("bn_dgrad")(operand)
    return primitive("select")(operand) if isinstance(operand, Masked) else operand


def matrix(t):
    return t.detach().double().permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def vector(channels, dtype, seed=7):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(wide)


def weight(out, in_, dtype, seed=3):
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(ours, expected, dtype, floor=1.0):
    """Elementwise within a few roundings of the dtype, relative to the largest value."""
    assert ours.shape == expected.shape
    assert torch.isfinite(ours).all(), "something was not written"
    scale = max(floor, expected.abs().max().item())
    assert (ours.double() - expected).abs().max() <= 4 * DTYPES[dtype] * scale


def norm_of(shape, dtype, relu=True):
    z = activation(*shape, dtype=dtype, seed=1)
    recipe = Norm(z, vector(shape[1], dtype, 1), vector(shape[1], dtype, 2), relu)
    y = matrix(z) * recipe.scale.double() + recipe.shift.double()
    return recipe, (y.relu() if relu else y).to(dtype).double()


def masked(shape, dtype):
    dout = activation(*shape, dtype=dtype, seed=4)
    kept = matrix(activation(*shape, seed=5)) > 0
    mask = torch.zeros(kept.shape[0], -(-shape[1] // 8), dtype=torch.uint8)
    for channel in range(shape[1]):
        mask[:, channel // 8] |= kept[:, channel].to(torch.uint8) << (channel % 8)
    return Masked(dout, mask), matrix(dout) * kept


def residuals(shape, dtype):
    """Each kind of residual of a [N, K, H, W] sum, and its values."""
    n, channels, h, w = shape
    tensor = activation(*shape, dtype=dtype, seed=21)
    recipe, rectified = norm_of(shape, dtype)
    linear = recipe._replace(relu=False)
    x = activation(n, 5, 2 * h, 2 * w, dtype=dtype, seed=23)[:, :, ::2, ::2]
    second = Second(x, weight(channels, 5, dtype), vector(channels, dtype, 24), vector(channels, dtype, 25))
    product = matrix(x) @ second.weight.double().T * second.scale.double() + second.shift.double()
    affine = matrix(recipe.z) * recipe.scale.double() + recipe.shift.double()
    return {
        "none": (None, torch.zeros(1, dtype=torch.float64)), "tensor": (tensor, matrix(tensor)),
        "norm": (linear, affine), "rectified": (recipe, affine.relu()), "second": (second, product),
    }
