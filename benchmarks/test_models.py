"""Networks in training and in evaluation, and how their cost grows with the batch and with depth:
pytest benchmarks -k "models or scaling" --benchmark-only [--full]"""

import pytest

from benchmarks.conftest import DEVICE
from benchmarks.groups import workload_group

GPU = DEVICE.type == "cuda"
NETWORKS = ("resnet18", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2", "timm-resnet50d",
            "timm-seresnet50", "timm-resnetv2_50")  # fmt: skip
NAMES = ("eager", "resfuse")
BATCH = 64 if GPU else 8
BATCHES = (1, 16, 64, 128, 256) if GPU else (1, 4, 16)
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
full = pytest.mark.full


def some(values, quick):
    return [pytest.param(value, marks=[] if value in quick else full) for value in values]


@pytest.mark.parametrize("implementation", [*NAMES, pytest.param("torch.compile", marks=full)])
@pytest.mark.parametrize("mode", some(("float32", "autocast-bfloat16", "autocast-float16"), ("float32",)))
@pytest.mark.parametrize("phase", ["train", "eval"])
@pytest.mark.parametrize("network", some(NETWORKS, ("resnet18", "resnet50")))
def test_models(network, phase, mode, implementation, compare, request):
    if mode == "autocast-float16" and not GPU:
        pytest.skip("fp16 AMP is for GPUs")
    subject = network if phase == "train" else f"{network}-eval"
    names = (*NAMES, "torch.compile") if request.config.getoption("--full") else NAMES
    compare((subject, mode), implementation, lambda: workload_group(subject, mode, BATCH, names, DEVICE), 12.0)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("batch", BATCHES)
def test_batch_scaling(batch, implementation, compare):
    key = "resnet50", "float32", f"batch-{batch}"
    compare(key, implementation, lambda: workload_group("resnet50", "float32", batch, NAMES, DEVICE), 12.0)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("network", some(DEPTHS, ("resnet18", "resnet50")))
def test_depth_scaling(network, implementation, compare):
    batch = 64 if GPU else 2
    key = network, "float32", f"batch-{batch}"
    compare(key, implementation, lambda: workload_group(network, "float32", batch, NAMES, DEVICE), 8.0)
