"""apply: a sum whose main branch is scale * z + shift, its mask and statistics (`csrc/cpu/apply.cpp`)."""

from ... import _native
from .. import flat
from ..interface import Norm, Reason, Second, Sum, Unsupported, Want, Written
from . import _operands
from .expand import expand


def apply(a: Norm, total: Sum, want: Want) -> Written:
    if isinstance(total.residual, Second):
        if total.row_scale is not None or total.gate is not None:
            text = "apply has no kernel for a weighed sum with a second convolution as residual"
            raise Unsupported([Reason("weighed_second", text)])
        product = total.residual  # the sum is symmetric: the convolution is the main branch, z the residual
        total = total._replace(residual=a._replace(relu=False))
        return expand(product.x, product.weight, product.scale, product.shift, total, want)
    _operands.check_views(z=a.z)
    results = _native.load().apply(a.z, a.scale, a.shift, *_operands.total(total, want))
    return flat.written(results, want)
