"""The pytest-benchmark suites: pytest benchmarks --benchmark-only [--full] [-k models] [--benchmark-json FILE]

pytest-benchmark takes one test after the other, but times that are compared have to be taken in turn, in the same
seconds. So the first test of a group measures all of its implementations, interleaved (`resfuse/testing/timing.py`; by
events on a GPU), and every test hands its own times to pytest-benchmark, through a clock that tells them again.
"""

from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import pytest
import torch

from resfuse.testing.environment import commit, device_name
from resfuse.testing.timing import interleave, ratio

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BASELINE = "eager"
ROUNDS = 21  # at most


class Clock:
    """Begins each round at 0 and ends it at what was measured."""

    def __init__(self):
        self.ticks: Iterator[float] = iter(())

    def set(self, seconds: list[float]) -> None:
        self.ticks = iter([tick for each in seconds for tick in (0.0, each)])

    def __call__(self) -> float:
        return next(self.ticks)


class Group(NamedTuple):
    """What is timed in turn. extra: of each call, for the results; missing: why an implementation has no call."""

    calls: dict[str, Callable[[], object]]
    extra: dict[str, dict]
    missing: dict[str, str] = {}  # noqa: RUF012


CLOCK = Clock()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every network, block and dtype: hours on two cores")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: only with --full")


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if item.get_closest_marker("full") and not config.getoption("--full")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK, disable_gc=False, warmup=False))


@pytest.fixture(scope="session")
def last():
    """The last group's times: tests of a group follow one another."""
    return {}


@pytest.fixture
def compare(benchmark, last):
    """compare(key, name, make, seconds): the times of implementation `name` in the group that make() makes."""

    def run(key: tuple, name: str, make: Callable[[], Group], seconds: float) -> None:
        if last.get("key") != key:
            last.clear()
            group = make()
            times = interleave(group.calls, budget=seconds, maximum=ROUNDS, warmup=2, device=DEVICE)
            last.update(key=key, times=times, extra=group.extra, missing=group.missing)
        if name not in last["times"]:
            pytest.skip(last["missing"].get(name, "not here"))
        own = last["times"][name]
        benchmark.group = " ".join(map(str, key))
        benchmark.extra_info.update(device=device_name(DEVICE), commit=commit(), **last["extra"].get(name, {}))
        if name != BASELINE and BASELINE in last["times"]:
            faster = ratio(last["times"][BASELINE], own)
            benchmark.extra_info["speedup"] = faster._asdict()
        if "batch" in benchmark.extra_info:
            benchmark.extra_info["images_per_second"] = benchmark.extra_info["batch"] / median(own)
        CLOCK.set(own)
        benchmark.pedantic(lambda: None, rounds=len(own))

    return run
