"""Interleaved timing: every callable once a round, so that drift of the machine meets all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import NamedTuple

import torch

LEVEL = 0.95


class Summary(NamedTuple):
    """Median and quartiles of `rounds` times, in seconds."""

    median: float
    low: float
    high: float
    rounds: int


class Ratio(NamedTuple):
    """Median of paired ratios with an interval for it that holds with probability `coverage`."""

    median: float
    low: float
    high: float
    coverage: float
    pairs: int


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    budget: float,
    minimum: int = 3,
    maximum: int = 1000,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    host: bool = True,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, list[float]]:
    """Seconds of each call, one a round, after `warmup` rounds that do not count.

    A round runs every call once; its order is rotated by one place each round. Rounds go on until another would pass
    `budget` seconds (warm-up included) or `maximum` is reached, never fewer than `minimum`. CUDA: measured by events,
    nothing of the operands in the L2 cache; host=False keeps the device busy until the host has issued the call, so
    that what is measured is the device's time alone. `progress` is given the share of the budget or rounds used.
    """
    if not calls or minimum < 1 or maximum < minimum:
        raise ValueError(f"need calls and 1 <= minimum <= maximum, got {len(calls)}, {minimum}, {maximum}")
    clock = _cuda_clock(torch.device(device), host) if torch.device(device).type == "cuda" else _wall_clock
    names, start = list(calls), time.perf_counter()
    times: dict[str, list[float]] = {name: [] for name in names}
    longest = 0.0  # of the rounds that count: a warm-up may compile
    for index in range(warmup + maximum):
        began = time.perf_counter()
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            seconds = clock(calls[name])
            if index >= warmup:
                times[name].append(seconds)
        used, done = time.perf_counter() - start, index + 1 - warmup
        progress(min(1.0, max(used / budget, done / maximum)))
        if done > 0:
            longest = max(longest, time.perf_counter() - began)
        if done >= minimum and used + longest > budget:
            break
    return times


def summary(seconds: list[float]) -> Summary:
    """Median and quartiles; a single time is its own quartiles."""
    low, _, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return Summary(median(seconds), low, high, len(seconds))


def ratio(numerator: list[float], denominator: list[float]) -> Ratio:
    """Median of `numerator[i] / denominator[i]`, of times taken in the same round, with its interval."""
    pairs = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, high, coverage = median_interval(pairs)
    return Ratio(median(pairs), low, high, coverage, len(pairs))


def median_interval(values: list[float], level: float = LEVEL) -> tuple[float, float, float]:
    """(low, high, coverage): the narrowest pair of symmetric order statistics that holds the median with probability
    `level`, whatever the distribution; with fewer than 6 values the range, whose coverage is less."""
    ordered, count = sorted(values), len(values)
    skipped, coverage = 0, 1 - 2 * _at_most(0, count)
    while skipped + 1 < (count + 1) // 2:
        narrower = 1 - 2 * _at_most(skipped + 1, count)
        if narrower < level:
            break
        skipped, coverage = skipped + 1, narrower
    return ordered[skipped], ordered[-1 - skipped], coverage


def _at_most(successes: int, trials: int) -> float:
    """Probability of at most `successes` heads in `trials` throws of a fair coin."""
    return sum(math.comb(trials, k) for k in range(successes + 1)) / 2**trials


def _wall_clock(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


CYCLES = 2e9  # of a multiprocessor in a second, at most
UNKNOWN = 5e-3  # seconds that the host may take to issue a call, before it has been seen


def _cuda_clock(device: torch.device, host: bool) -> Callable[[Callable[[], object]], float]:
    size = torch.cuda.get_device_properties(device).L2_cache_size
    other = torch.zeros(size // 4, dtype=torch.float64, device=device)  # twice the cache
    issued: dict[int, float] = {}  # seconds, by call

    def clock(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.sum()  # read, not written: what is written would have to leave the cache during the call
        if not host:
            torch.cuda._sleep(int(1.5 * CYCLES * issued.get(id(call), UNKNOWN)))
        start.record()
        began = time.perf_counter()
        call()
        issued[id(call)] = time.perf_counter() - began
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock
