"""The static cost model."""

import pytest

from resfuse.functions import cost


def test_few_rows_do_not_tell_a_covariance():
    assert cost.covariance_rows(64, 64, 10**9) == 256


@pytest.mark.parametrize("width, rows", [(64, 256), (512, 2048)])
def test_identity_bottlenecks_take_it_from_four_rows_a_channel(width, rows):
    macs = 17 * width**2
    assert cost.covariance_rows(width, 4 * width, macs) == rows


def test_wide_products_are_a_limited_share_of_the_block():
    macs = 10**7
    rows = cost.covariance_rows(1024, 4096, macs)
    assert rows > 4 * 1024 and 2 * 4096 * 1024**2 == pytest.approx(cost.PRODUCTS_SHARE * 3 * macs * rows, rel=1e-3)


def test_only_widening_pointwise_convolutions_have_the_form():
    assert cost.has_covariance_form((1, 1), (0, 0), 1, 64, 256)
    assert not cost.has_covariance_form((1, 1), (0, 0), 1, 256, 64)
    assert not cost.has_covariance_form((3, 3), (1, 1), 1, 64, 64)
    assert not cost.has_covariance_form((1, 1), (0, 0), 2, 64, 64)
    assert not cost.has_covariance_form((1, 1), (1, 1), 1, 64, 64)
