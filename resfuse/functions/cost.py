"""The static cost model: where the covariance form of a 1x1 convolution pays.

It saves the convolution's output in both directions and costs, whatever the batch, two wide K*C^2 products
(W @ cov and Q) besides the covariance itself. It is taken from `covariance_rows` rows on; below that the output is
recomputed in backward from the activation that is kept anyway, which saves as much and costs one more product. Below
`few_rows` the output is so small beside what training holds for the weights that it is kept.
"""

from __future__ import annotations

import math

# The share of a block's arithmetic (forward + backward) that the two K*C^2 products may take.
PRODUCTS_SHARE = 0.05


def covariance_rows(in_channels: int, out_channels: int, block_macs: int) -> int:
    """Rows M from which the covariance form pays for a 1x1 convolution with C = in_channels, K = out_channels.

    block_macs: multiply-adds of the whole block's forward per output row; backward takes twice as many.
    """
    per_row = PRODUCTS_SHARE * 3 * block_macs
    products = 2 * out_channels * in_channels**2
    # A covariance of C channels from fewer than a few C rows costs more than it tells.
    return max(4 * in_channels, math.ceil(products / per_row))


def few_rows(in_channels: int) -> int:
    """Rows below which the output [M, K] is kept: it then has fewer values than its weight [K, C], that one's gradient
    and an optimizer's two moments."""
    return 4 * in_channels


def has_covariance_form(kernel: tuple[int, int], padding: tuple[int, int], groups: int, in_: int, out: int) -> bool:
    """Whether a convolution is a 1x1 (any stride) that does not narrow."""
    return kernel == (1, 1) and padding == (0, 0) and groups == 1 and out >= in_
