"""pytest-benchmark suite over blocks: `pytest benchmarks --benchmark-only`, implementations side by side.

The rows' extra_info holds the device, the batch and the bytes that a step keeps and peaks at.
"""

import pytest
import torch

from resfuse.bench.implementations import EAGER, RESFUSE
from resfuse.bench.workloads import make
from resfuse.testing.cases import FAMILY, PROJECTIONS, STAGES
from resfuse.testing.environment import environment
from resfuse.testing.memory import peak_bytes, saved_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 64 if DEVICE.type == "cuda" else 2


@pytest.mark.parametrize("implementation", [EAGER, RESFUSE], ids=lambda each: each.name)
@pytest.mark.parametrize("case", [*STAGES, *PROJECTIONS, *FAMILY], ids=lambda case: case.name)
def test_train_step(case, implementation, benchmark):
    workload = make(case.name, "float32", BATCH, DEVICE)
    runner = workload.runner(implementation)
    runner.step()
    benchmark.group = case.name
    benchmark.extra_info.update(
        device=environment(DEVICE)["device"],
        batch=BATCH,
        saved_bytes=saved_bytes(runner.forward, runner.model, [runner.x]),
        peak_bytes=peak_bytes(runner.step, DEVICE),
    )

    def step():
        runner.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
