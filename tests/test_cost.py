"""The static cost model."""

import pytest
import units

from resfuse import calls, functional
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


def test_a_strided_blocks_first_convolution_counts_for_every_pixel_it_makes():
    """1024 -> 2048 at stride 2: conv1 makes four rows for each of the output's."""
    convs = [units.conv_bn(64, 64, 1), units.conv_bn(64, 64, 3), units.conv_bn(64, 512, 1)]
    strided = [convs[0], convs[1]._replace(stride=(2, 2)), convs[2]]
    macs = [64 * 64 * steps + 9 * 64 * 64 + 64 * 512 for steps in (1, 4)]
    found = [functional.forms(c, None)[2].rows for c in (convs, strided)]
    assert found == [cost.covariance_rows(64, 512, m) for m in macs] and found[0] > found[1] > 4 * 64


def test_forms_of_the_family():
    def kinds(convs, shortcut=None):
        return [form.kind for form in functional.forms(convs, shortcut)]

    three, wide, narrow = units.conv_bn(8, 8, 3), units.conv_bn(8, 32), units.conv_bn(32, 8)
    assert kinds([three, three], units.conv_bn(8, 8)) == ["keep", "keep", "covariance"]
    assert kinds([narrow]) == ["keep"] and kinds([wide]) == ["covariance"]
    strided = wide._replace(stride=(2, 2))
    assert kinds([strided]) == ["covariance"] and kinds([three, strided])[-1] == "recompute"
    assert kinds([units.conv_bn(8, 32, groups=2)]) == ["recompute"]
    assert kinds([three, units.conv(8, 8)]) == ["keep", "covariance"], "no BatchNorm: no statistics, no product stored"
    assert kinds([three, units.conv(8, 8, 3)]) == ["keep", "linear"]
    form = functional.forms([three, wide], None)[1]
    assert form.at(form.rows, True) == "covariance" == form.at(1, False) and form.at(form.rows - 1, True) == "recompute"
    assert form.few == 32 and form.at(32, True) == "recompute" and form.at(31, True) == "keep"


def test_on_a_gpu_small_products_cost_more():
    """ResNet-50's blocks at batch 256: rows of each stage and of the shortcut that begins it."""
    stages = {(64, 256): 802816, (128, 512): 200704, (256, 1024): 50176, (512, 2048): 12544}
    taken = [rows >= cost.gpu_covariance_rows(*channels) for channels, rows in stages.items()]
    assert taken == [True, True, True, False]
    assert cost.gpu_covariance_rows(256, 512) < 200704 and cost.gpu_covariance_rows(512, 1024) == cost.NEVER


def test_a_form_that_never_pays_serves_constant_statistics():
    form = calls.Form("covariance", cost.NEVER, 32)
    assert str(form) == "recompute" == form.at(10**9, True) and form.at(31, True) == "keep"
    assert form.at(31, False) == "covariance"


def test_only_widening_pointwise_convolutions_have_the_form():
    assert cost.has_covariance_form((1, 1), (0, 0), 1, 64, 256)
    assert not cost.has_covariance_form((1, 1), (0, 0), 1, 256, 64)
    assert not cost.has_covariance_form((3, 3), (1, 1), 1, 64, 64)
    assert not cost.has_covariance_form((1, 1), (0, 0), 2, 64, 64)
    assert not cost.has_covariance_form((1, 1), (1, 1), 1, 64, 64)
