"""Names for profilers: a range for each fused block, its steps and its primitives, in torch.profiler's traces and in
NVTX, which nsys and ncu read.

    layer1.0                          the module's forward
      layer1.0 block                  its Function's forward: block, bn_relu; in backward layer1.0 block_backward
        resfuse.conv_stats            a primitive

Nothing looks whether ranges are wanted: `profile_ranges` puts other functions in place of those that are called
without. Off, they are not there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .blocks.mixin import FusedMixin
from .functions import replay
from .kernels import dispatch

MOST = 4096  # forwards whose backward has not come yet, and names remembered of them


class profile_ranges:
    """Context manager: inside, fused blocks and their primitives are ranges, in every thread of the process.

    `RESFUSE_NVTX=1` in the environment does so from the import on. primitives False (`RESFUSE_NVTX=blocks`): blocks
    alone. Steps are then replayed as ever; with primitives they are not, so the host takes longer for the same
    kernels.
    """

    def __init__(self, primitives: bool = True):
        self.primitives = primitives
        self.calls = threading.local()  # modules: name and range of those that are running, None of most
        self.names: dict[int, str] = {}  # of modules, by id
        self.begun: dict[int, tuple[object, str]] = {}  # of a forward, by its description

    def __enter__(self) -> profile_ranges:
        with ExitStack() as stack:
            if self.primitives:
                stack.enter_context(dispatch.watched(self._primitive))
            hooks = (
                register_module_forward_pre_hook(self._before),
                register_module_forward_hook(self._after, always_call=True),
            )
            for hook in hooks:
                stack.callback(hook.remove)
            self.plain, replay.run = replay.run, self._run
            stack.callback(setattr, replay, "run", self.plain)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self.stack.close()

    def _before(self, module: nn.Module, args) -> None:
        running = self._running()
        if not running:  # the outermost one, which knows the names
            self.names = {id(each): name for name, each in module.named_modules()}
        name = None
        if isinstance(module, FusedMixin) and not torch.compiler.is_compiling():
            name = self.names.get(id(module)) or type(module).__name__
        span = None if name is None else _span(name)
        running.append((name, span))
        if span is not None:
            span.__enter__()

    def _after(self, module: nn.Module, args, output) -> None:
        running = self._running()
        span = running.pop()[1] if running else None  # none where the ranges began inside its forward
        if span is not None:
            span.__exit__(None, None, None)

    def _run(self, k, step: str, spec, tensors, call: Callable, *more):
        """`replay.run`, named by the module that runs; in backward by that of its forward."""
        if step.endswith("_backward"):
            name = self.begun.pop(id(spec), (None, ""))[1]
        elif step.endswith("_again"):  # in backward too, before that
            name = self.begun.get(id(spec), (None, ""))[1]
        else:
            name = next((name for name, _ in reversed(self._running()) if name is not None), "")
            if spec is not None and spec.differentiable:
                if len(self.begun) >= MOST:
                    self.begun.clear()
                self.begun[id(spec)] = spec, name
        with _span(f"{name} {step}".strip()):
            return call() if self.primitives else self.plain(k, step, spec, tensors, call, *more)

    @contextmanager
    def _primitive(self, name: str, operands: tuple) -> Iterator[Callable]:
        with _span(f"resfuse.{name}"):
            yield _nothing

    def _running(self) -> list:
        if not hasattr(self.calls, "modules"):
            self.calls.modules = []
        return self.calls.modules


def from_environment(value: str) -> None:
    """What `RESFUSE_NVTX` asks for; ValueError for a value that it does not have."""
    if value not in ("", "0", "1", "blocks"):
        raise ValueError(f"RESFUSE_NVTX must be 0, 1 or blocks, got {value!r}")
    if value in ("1", "blocks"):
        profile_ranges(primitives=value == "1").__enter__()


@contextmanager
def _span(name: str) -> Iterator[None]:
    with torch.profiler.record_function(name):
        if torch.version.cuda is None:
            yield
            return
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()


def _nothing(result) -> None:
    pass
