"""Training steps of blocks: pytest benchmarks -k blocks --benchmark-only [--full]"""

import pytest

from benchmarks.conftest import DEVICE
from benchmarks.groups import workload_group
from resfuse.testing.cases import FAMILY, PROJECTIONS, STAGES

BATCH = 64 if DEVICE.type == "cuda" else 4
QUICK = ("stage1", "stage3", "stage2-projection", "basic-stage1", "stem")
CASES = [case.name for case in (*STAGES, *PROJECTIONS, *FAMILY)]
MODES = ["float32", pytest.param("autocast-bfloat16", marks=pytest.mark.full)]


@pytest.mark.parametrize("implementation", ["eager", "resfuse"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in CASES]
)
def test_blocks(case, mode, implementation, compare):
    names = ("eager", "resfuse")
    compare((case, mode), implementation, lambda: workload_group(case, mode, BATCH, names, DEVICE), 3.0)
