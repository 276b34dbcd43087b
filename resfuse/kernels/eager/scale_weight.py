"""scale_weight: Wg = scale[:, None] * weight, rounded once to storage."""

from torch import Tensor


def scale_weight(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight * scale[:, None]).to(weight.dtype)
