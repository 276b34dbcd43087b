"""Floating-point operations of a primitive's products, from its operands: two for each multiply-add, pointwise
arithmetic counts as none. `functions/flops.py` has the same by block, and a test compares them."""

from __future__ import annotations

from math import prod

from torch import Tensor

from ...kernels.interface import BNGrad, Masked, Norm, Second, Sum


def primitive_operations(primitive: str, operands: tuple, result) -> int:
    """operands: the arguments in order, those given by name last."""
    formula = FORMULAS.get(primitive)
    return 0 if formula is None else 2 * formula(operands, result)


def _tensor(operand) -> Tensor:
    while not isinstance(operand, Tensor):
        if isinstance(operand, Norm):
            operand = operand.z
        elif isinstance(operand, Masked):
            operand = operand.dout
        elif isinstance(operand, BNGrad):
            operand = operand.dy
    return operand


def _rows(operand) -> int:
    shape = _tensor(operand).shape
    return shape[0] * prod(shape[2:])


def _conv_stats(operands, result) -> int:
    return _rows(result[0]) * operands[1].numel()


def _covariance(operands, result) -> int:
    return _rows(operands[0]) * _tensor(operands[0]).shape[1] ** 2


def _expand_stats(operands, result) -> int:
    return operands[0].shape[0] * operands[0].shape[1] ** 2


def _expand(operands, result) -> int:
    return _rows(operands[0]) * (operands[1].numel() + _second(operands[4]))


def _apply(operands, result) -> int:
    return _rows(operands[0]) * _second(operands[1])


def _second(total: Sum) -> int:
    """Multiply-adds of a sum's second product for a row."""
    return total.residual.weight.numel() if isinstance(total.residual, Second) else 0


def _expand_products(operands, result) -> int:
    return _rows(operands[1]) * result[0].numel() * (1 if result[2] is None else 2)


def _expand_coefficients(operands, result) -> int:
    return 2 * operands[2].numel() * operands[2].shape[1]


def _expand_dgrad(operands, result) -> int:
    _, u, a, wg, q, *_ = operands
    return _rows(a) * ((wg.numel() if u is None else 0) + (0 if q is None else q.numel()))


def _conv_backward(operands, result) -> int:
    grad, weight, needs = operands[0], operands[2], operands[5]
    return _rows(grad) * weight.numel() * sum(needs)


FORMULAS = {
    "conv_stats": _conv_stats, "covariance": _covariance, "expand_stats": _expand_stats, "expand": _expand,
    "expand_products": _expand_products, "expand_coefficients": _expand_coefficients, "expand_dgrad": _expand_dgrad,
    "conv_backward": _conv_backward, "apply": _apply,
}  # fmt: skip
