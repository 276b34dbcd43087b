"""A pytest plugin: another library's own tests, on fused models. `python -m resfuse peers` runs it:

    pytest -p resfuse.testing.peers --peer timm --rootdir CHECKOUT CHECKOUT/tests/test_models.py

Whatever the library's builders return is fused before a test sees it, and each test's report says how much was; a run
in which no test ran a fused block fails. `torch.jit.script` gets models unfused, the step that its error asks for. What
cannot hold for a fused model is in `KNOWN`.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from .. import convert
from ..blocks.mixin import FusedMixin, State


class Known(NamedTuple):
    """Tests of a library, as a pattern of their names, in which an assertion may fail after a fused call, and why."""

    library: str
    tests: str
    reason: str


OTHER_BITS = "wants the bits of the original forward, which fx traces; the fused one rounds other sums"
KNOWN = (
    Known("timm", "test_model_forward_fx[*", OTHER_BITS),
    Known("timm", "test_model_forward_intermediates[*", OTHER_BITS),
    Known("torchvision", "test_feature_extraction_methods_equivalence", OTHER_BITS),
    Known("torchvision", "test_classification_model[[]*-wide_resnet50_2]", OTHER_BITS),
    Known("torchvision", "test_detection_model[*", "compares boxes of random weights with a scripted, unfused twin's"),
)
LIBRARIES = ("timm", "torchvision")
PROPERTY = "resfuse"  # of a test's report; plain numbers, which travel from workers too
tally: Counter[str] = Counter()  # of the test that runs


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resfuse")
    group.addoption("--peer", choices=LIBRARIES, help="fuse every model that this library builds")
    group.addoption("--peer-eager", action="store_true", help="leave them as they are, to compare")
    group.addoption("--peer-results", type=Path, metavar="FILE", help="JSON: each test's outcome, and what was fused")


def pytest_configure(config: pytest.Config) -> None:
    library = config.getoption("--peer")
    if library is None:
        return
    importlib.import_module(library)  # the installed one: tests may put their checkout before it
    fusing = not config.getoption("--peer-eager")
    if fusing:
        patch = pytest.MonkeyPatch()
        config.add_cleanup(patch.undo)
        for namespace, name, builder in list(_builders(library)):
            patch.setitem(namespace, name, builder)
        _patch_calls(patch)
    config.pluginmanager.register(_Results(library, fusing, config.getoption("--peer-results")), "resfuse-results")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    tally.clear()
    try:
        return (yield)
    except AssertionError:
        library = item.config.getoption("--peer")
        for known in KNOWN:
            if tally["fused_calls"] and known.library == library and fnmatch(item.name, known.tests):
                pytest.xfail(known.reason)
        raise
    finally:
        item.user_properties.append((PROPERTY, dict(tally)))


def _builders(library: str) -> Iterator[tuple[dict, str, Callable]]:
    """(namespace, name, builder of fused models) wherever the library has a builder, imported by name or not."""
    if library == "timm":
        originals = [sys.modules["timm"].create_model]
    else:
        registry = importlib.import_module("torchvision.models._api").BUILTIN_MODELS
        originals = list(registry.values())
    fused = {id(builder): _fused(builder) for builder in originals}
    namespaces = [vars(m) for name, m in sys.modules.items() if m and name.partition(".")[0] == library]
    if library == "torchvision":
        namespaces.append(registry)
    for namespace in namespaces:
        yield from ((namespace, name, fused[id(value)]) for name, value in namespace.items() if id(value) in fused)


_building = 0  # builders that call builders: the outermost one's model is fused


def _fused(builder: Callable) -> Callable:
    @functools.wraps(builder)
    def build(*args, **kwargs):
        global _building
        _building += 1
        try:
            model = builder(*args, **kwargs)
        finally:
            _building -= 1
        if not _building:
            blocks = _fuse(model)
            tally.update(models=1, fused_models=int(blocks > 0), blocks=blocks)
        return model

    return build


def _fuse(model: nn.Module) -> int:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="resfuse.fuse fused nothing")
        convert.fuse(model)
    return sum(isinstance(module, FusedMixin) for module in model.modules())


def _patch_calls(patch: pytest.MonkeyPatch) -> None:
    """Count the calls that run fused and those that do not, and unfuse around torch.jit.script."""
    refusal, count, script = FusedMixin._refusal, State.count, torch.jit.script

    def counted_refusal(self, x):
        reason = refusal(self, x)
        if reason is None:
            tally["fused_calls"] += 1
        return reason

    def counted(self, reason):
        if reason.code == "argument":  # found out after all else had been accepted
            tally["fused_calls"] -= 1
        tally[f"original_calls:{reason.code}"] += 1
        return count(self, reason)

    def scripted(obj, *args, **kwargs):
        if not isinstance(obj, nn.Module) or not any(isinstance(module, FusedMixin) for module in obj.modules()):
            return script(obj, *args, **kwargs)
        try:
            return script(convert.unfuse(obj), *args, **kwargs)
        finally:
            _fuse(obj)

    patch.setattr(FusedMixin, "_refusal", counted_refusal)
    patch.setattr(State, "count", counted)
    patch.setattr(torch.jit, "script", scripted)


class _Results:
    """What became of each test, in the process that reports."""

    def __init__(self, library: str, fusing: bool, out: Path | None):
        self.library, self.fusing, self.out = library, fusing, out
        self.tests: dict[str, dict] = {}

    @property
    def nothing_fused(self) -> bool:
        return self.fusing and not any(test["counts"].get("fused_calls") for test in self.tests.values())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:  # of set-up and end what went wrong there
            outcome, text = report.outcome, ""
            if hasattr(report, "wasxfail"):
                outcome, text = {"skipped": "xfailed", "passed": "xpassed"}[outcome], report.wasxfail
            elif report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                text = crash.message.splitlines()[0] if crash else str(report.longrepr).splitlines()[-1]
            counts = dict(report.user_properties).get(PROPERTY, {})
            self.tests[report.nodeid] = {"outcome": outcome, "text": text, "counts": counts}

    @pytest.hookimpl(trylast=True)  # after a conftest that makes a run without tests pass
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return
        if self.nothing_fused and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self.out is not None:
            self.out.write_text(json.dumps(self.tests))

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.nothing_fused:
            terminalreporter.write_line(f"resfuse: no test ran a fused block of {self.library}", red=True)
