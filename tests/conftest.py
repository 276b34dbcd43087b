import zlib
from collections import defaultdict

import pytest
import torch

from resfuse import calls


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    products = defaultdict(list)
    for item in items:
        share = item.get_closest_marker("one_in")
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if share is not None and parameters and share.kwargs.items() <= parameters.items():
            products[item.function, share.args[0]].append(item)
    for (_, n), product in products.items():
        for item in set(product).difference(sample(product, n)):
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no_gpu: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def sample(product, n):
    """About one in n of a test's cases, the same ones always; of several parameters each value is among them."""
    seen = set()
    for item in sorted(product, key=lambda item: zlib.crc32(item.nodeid.encode())):
        values = {(name, repr(value)) for name, value in item.callspec.params.items()}
        new = len(values) > 1 and not values <= seen
        if new or zlib.crc32(item.nodeid.encode()) % n == 0:
            seen |= values
            yield item


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unsettled(monkeypatch):
    """What a call's description decides is decided anew: tests patch what decides it."""
    monkeypatch.setattr(calls, "_settled_calls", {})


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN, so that reading what nothing wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def deterministic():
    """The vendor's convolutions give the same bits too, which on a GPU they promise only where asked."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def exact(monkeypatch):
    """A GPU's products of float32 do not round what they read."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
