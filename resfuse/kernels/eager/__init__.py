"""The eager kernel set: every primitive in plain torch operations, any device and floating dtype.

It is the oracle that other sets are tested against, and the fallback where none of them runs. It follows the
formulas in storage-rounded operands and wide accumulation, pass by pass, without cleverness in the arithmetic.
"""

from ..interface import PRIMITIVES as PRIMITIVES
from ..interface import Reason

STATUS = "oracle: torch operations, tested in float64 to float16"


def unsupported(device: str, dtype) -> list[Reason]:
    """Why this set cannot serve a device type and storage dtype; it serves all."""
    return []
