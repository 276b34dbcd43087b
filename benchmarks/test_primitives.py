"""Primitives of a bottleneck's step, by kernel set: pytest benchmarks -k primitives --benchmark-only [--full]"""

from dataclasses import replace

import pytest
import torch

from benchmarks.conftest import DEVICE
from benchmarks.groups import primitive_group
from benchmarks.primitives import sets, works
from resfuse.testing.cases import CASES

BATCH = 256 if DEVICE.type == "cuda" else 2
PRIMITIVES = list(works(replace(CASES["stage1"], batch=1), torch.float32, torch.device("cpu")))
full = pytest.mark.full


@pytest.mark.parametrize("kernel_set", list(sets(DEVICE, torch.float32)))
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=full)])
@pytest.mark.parametrize("primitive", PRIMITIVES)
@pytest.mark.parametrize("case", ["stage1", "stage3", *(pytest.param(c, marks=full) for c in ("stage2", "stage4"))])
def test_primitives(case, primitive, dtype, kernel_set, compare):
    make = lambda: primitive_group(case, primitive, getattr(torch, dtype), BATCH, DEVICE)  # noqa: E731
    compare((case, primitive, dtype), kernel_set, make, 1.0)
