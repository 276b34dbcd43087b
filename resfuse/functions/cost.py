"""The static cost model: where the covariance form of a 1x1 convolution pays.

It saves the convolution's output in both directions and costs, whatever the batch, two wide K*C^2 products
(W @ cov and Q) besides the covariance itself. It is taken from `covariance_rows` rows on; below that the output is
recomputed in backward from the activation that is kept anyway, which saves as much and costs one more product. Below
`few_rows` the output is so small beside what training holds for the weights that it is kept.

A GPU moves tensors quickly beside what it takes for small products, so there the form has to pay for itself in time:
`gpu_covariance_rows`.
"""

from __future__ import annotations

import math

# The share of a block's arithmetic (forward + backward) that the two K*C^2 products may take.
PRODUCTS_SHARE = 0.05
NEVER = math.inf


def covariance_rows(in_channels: int, out_channels: int, block_macs: int) -> int:
    """Rows M from which the covariance form pays for a 1x1 convolution with C = in_channels, K = out_channels.

    block_macs: multiply-adds of the whole block's forward per output row; backward takes twice as many.
    """
    per_row = PRODUCTS_SHARE * 3 * block_macs
    products = 2 * out_channels * in_channels**2
    # A covariance of C channels from fewer than a few C rows costs more than it tells.
    return max(4 * in_channels, math.ceil(products / per_row))


# Of ResNet-50's blocks in bfloat16 on an H100, in units of the time that one value takes to be read or written: passes
# over the output that the form spares, and what a multiply-add costs in the covariance and in the product with q, which
# every row has, and in W @ cov and Q, which are taken once.
WIDE_PASSES = 6
ROW_PRODUCT, WEIGHT_PRODUCT = 0.04, 0.5


def gpu_covariance_rows(in_channels: int, out_channels: int) -> float:
    """Rows M from which the covariance form is the faster one on a GPU, NEVER where it is for none."""
    each = WIDE_PASSES * out_channels - ROW_PRODUCT * in_channels**2
    if each <= 0:
        return NEVER
    return max(4 * in_channels, math.ceil(WEIGHT_PRODUCT * out_channels * in_channels**2 / each))


def few_rows(in_channels: int) -> int:
    """Rows below which the output [M, K] is kept: it then has fewer values than its weight [K, C], that one's gradient
    and an optimizer's two moments."""
    return 4 * in_channels


def has_covariance_form(kernel: tuple[int, int], padding: tuple[int, int], groups: int, in_: int, out: int) -> bool:
    """Whether a convolution is a 1x1 (any stride) that does not narrow."""
    return kernel == (1, 1) and padding == (0, 0) and groups == 1 and out >= in_
