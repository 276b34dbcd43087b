"""The native library: loaded at first use, and refused if it was built for another torch."""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from .kernels import fakes
from .kernels.interface import Reason, Unsupported

RECORD = Path(__file__).with_name("_build.json")
LIBRARY = Path(__file__).with_name("_ops.so")
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."


@cache
def unavailable() -> tuple[Reason, ...]:
    """Why the native library cannot be used here; empty if it can. Loads nothing: the build record is read first."""
    if not (RECORD.exists() and LIBRARY.exists()):
        text = f"resfuse was installed without its native library; `{REBUILD}` in its source folder builds it"
        return (Reason("native_missing", text),)
    record = build_record()
    running = {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
    }
    if any(record.get(key) != value for key, value in running.items()):
        text = (
            f"resfuse's native library was built for {_describe(record)} and this is {_describe(running)}; "
            f"`{REBUILD}` in its source folder rebuilds it"
        )
        return (Reason("native_torch_mismatch", text),)
    return ()


@cache
def load() -> ModuleType:
    """The operators, `torch.ops.resfuse`. Raises Unsupported with the reason if they cannot be used here."""
    reasons = unavailable()
    if reasons:
        raise Unsupported(reasons)
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise Unsupported([Reason("native_load_failed", f"{LIBRARY.name} did not load: {error}")]) from error
    fakes.register("resfuse")
    return torch.ops.resfuse


@cache
def module() -> ModuleType | None:
    """`resfuse._C`, None where it was not built."""
    if unavailable():
        return None
    try:
        return importlib.import_module("resfuse._C")
    except ImportError:
        return None


def build_record() -> dict:
    """What the build wrote down; empty where there was none."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def build_facts() -> dict:
    """The build record and, where `_C` exists, what the compiler itself reports."""
    compiled = module()
    return {**build_record(), **(compiled.build_facts() if compiled else {})}


def _describe(build: dict) -> str:
    abi = "" if build.get("cxx11_abi") else ", without the C++11 ABI"
    return f"torch {build.get('torch')} (CUDA {build.get('torch_cuda') or 'absent'}{abi})"
