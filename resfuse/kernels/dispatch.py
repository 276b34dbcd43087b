"""Which kernel set serves a call: primitive by primitive, with reasons.

`auto` asks the sets whose tests passed on such a device in the order below, one that was measured to be faster before
others, and falls back, once per primitive and reason in the log and in the report; a named backend runs every primitive
itself or raises `Unsupported` with every reason.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from types import ModuleType, SimpleNamespace

import torch

from . import measured
from .interface import PRIMITIVES, Reason, Unsupported

log = logging.getLogger("resfuse")

ORDER = ("triton", "cuda", "cpu", "eager")  # preferred first
_fallbacks: dict[tuple[str, str, str], Reason] = {}
_within: Callable | None = None


def backends() -> tuple[str, ...]:
    """Accepted values of `backend`."""
    return ("auto", *ORDER)


def kernel_set(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


@cache
def kernels(backend: str, device: str, dtype: torch.dtype) -> SimpleNamespace:
    """One callable per primitive for a device type and storage dtype; `chosen` names their sets, `replays` is for those
    who call them, `any_activation` says whether depthwise convolutions read any activation's recipe, and
    `takes_image(x, dtype, weight, geometry)` whether a convolution of an image's few channels is a set's own.

    backend: "auto" or a kernel set's name. Raises Unsupported with every reason if the named set cannot serve
    all primitives there.
    """
    if backend not in backends():
        raise ValueError(f"backend={backend!r} is not one of {', '.join(backends())}")
    if backend != "auto":
        reasons = missing(backend, device, dtype)
        if reasons:
            raise Unsupported(reasons)
    order = [name for name in ORDER if measured.proven(name, device)] if backend == "auto" else [backend]
    usable = []
    for name in order:
        reasons = kernel_set(name).unsupported(device, dtype)
        if not reasons:
            usable.append(name)
    faster = measured.preferred(device, dtype) if backend == "auto" else {}
    chosen = {}
    for primitive in PRIMITIVES:
        able = [name for name in usable if primitive in kernel_set(name).PRIMITIVES]
        if backend == "auto":
            able = [name for name in able if primitive not in measured.UNPROVEN.get(name, ())]
        chosen[primitive] = sorted(able, key=lambda name: name != faster.get(primitive))  # noqa: B023
    log.info("kernels for %s %s: %s", device, dtype, {p: s[0] for p, s in chosen.items()})
    readers = [kernel_set(chosen[p][0]) for p in ("conv_stats", "conv_backward")]
    return SimpleNamespace(
        chosen={p: s[0] for p, s in chosen.items()}, replays={},
        any_activation=all(getattr(each, "ANY_ACTIVATION", False) for each in readers),
        takes_image=getattr(readers[0], "takes_image", _never) if readers[0] is readers[1] else _never,
        **{p: _seen(p, _first_able(p, s)) for p, s in chosen.items()},
    )  # fmt: skip


def missing(backend: str, device: str, dtype: torch.dtype) -> list[Reason]:
    """Every reason why a kernel set alone cannot run a whole block on a device type in a storage dtype."""
    chosen = kernel_set(backend)
    lacks = [p for p in PRIMITIVES if p not in chosen.PRIMITIVES]
    reasons = list(chosen.unsupported(device, dtype))
    if lacks:
        reasons.append(Reason("primitive_missing", f"kernel set {backend!r} has no {', '.join(lacks)}"))
    return reasons


def fallbacks() -> list[tuple[str, str, Reason]]:
    """(primitive, kernel set, reason) of every refusal that sent a call to the next set, each once."""
    return [(primitive, name, reason) for (primitive, name, _), reason in _fallbacks.items()]


@contextmanager
def watched(within: Callable) -> Iterator[None]:
    """Inside, a Function calls a primitive within(its name, its operands), a context whose value is called with the
    result. What is called is another function then, so that nobody pays for it outside."""
    global _within
    before, _within = _within, within
    kernels.cache_clear()
    try:
        yield
    finally:
        _within = before
        kernels.cache_clear()


def _never(*_) -> bool:
    return False


def _seen(primitive: str, function: Callable) -> Callable:
    if _within is None:
        return function
    within = _within

    @wraps(function)
    def call(*args, **kwargs):
        with within(primitive, (*args, *kwargs.values())) as gave:
            result = function(*args, **kwargs)
            gave(result)
            return result

    return call


def _first_able(primitive: str, names: list[str]) -> Callable:
    functions = [getattr(importlib.import_module(f"{__package__}.{n}.{primitive}"), primitive) for n in names]
    if len(functions) == 1:
        return functions[0]

    def call(*args, **kwargs):
        for name, function in zip(names[:-1], functions[:-1], strict=True):
            try:
                return function(*args, **kwargs)
            except Unsupported as refusal:
                _note(primitive, name, refusal.reasons)
        return functions[-1](*args, **kwargs)

    return call


def _note(primitive: str, name: str, reasons: tuple[Reason, ...]) -> None:
    for reason in reasons:
        if (primitive, name, reason.code) not in _fallbacks:
            _fallbacks[primitive, name, reason.code] = reason
            log.info("%s: kernel set %s refused (%s: %s)", primitive, name, *reason)
