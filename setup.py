"""Builds resfuse's native library. The metadata is in pyproject.toml.

RESFUSE_NATIVE=0|1        1 (the default on Linux) builds the native library; 0 gives a pure-Python package.
RESFUSE_CUDA=0|1|auto     1 builds the CUDA kernels or stops; auto (the default) builds them for the GPUs at hand.
TORCH_CUDA_ARCH_LIST      overrides the GPU architectures, as in torch's own extensions.
RESFUSE_SANITIZE=1        builds the operators with the address and undefined-behaviour sanitizers (`make sanitize`).

Two shared objects: `_ops.so`, operators without a Python symbol, and `_C`, a small pybind11 module of build facts and
kernel launches. `_build.json` beside them records what they were built for; `resfuse/_native.py` reads it before it
loads anything.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
INSTALL = "pip install --no-build-isolation ."
RELEASE_ARCHS = ("8.0", "8.6", "8.9", "9.0a", "10.0a", "12.0", "8.0+PTX")
TOOLKIT_PARTS = ("bin/nvcc", "include/cuda_runtime_api.h")  # a wrapper on PATH leads to a folder without the second
# No contraction to fused multiply-add: the same bits on every instruction set.
CXX_FLAGS = [
    "-O3", "-g0", "-Wall", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
]  # fmt: skip
SANITIZE_FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize=vptr"]
NVCC_FLAGS = ["-O3", "--fmad=false", "--expt-relaxed-constexpr"]


def stop(sentence: str) -> None:
    sys.exit(f"resfuse: {sentence}")


def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        stop(f"{name}={value!r} is not one of {', '.join(allowed)}.")
    return value


def local_archs(torch) -> list[str]:
    """Architectures of the GPUs at hand; 9.0 and 10.0 in the variant that has their matrix instructions."""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}.{minor}" + ("a" if (major, minor) in ((9, 0), (10, 0)) else "") for major, minor in sorted(found)]


def cuda_plan(torch) -> tuple[list[str], str | None]:
    """Architectures to build CUDA kernels for, or none and the sentence that says why."""
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = choice("RESFUSE_CUDA", "auto", ("0", "1", "auto"))
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    why = None
    if wanted == "0":
        return [], "RESFUSE_CUDA=0"
    if not any((ROOT / "csrc" / "cuda").glob("*.cu")):
        why = "this version of resfuse has no CUDA sources"
    elif torch.version.cuda is None:
        why = f"torch {torch.__version__} was built without CUDA"
    elif CUDA_HOME is None or not all((Path(CUDA_HOME) / part).exists() for part in TOOLKIT_PARTS):
        why = f"{CUDA_HOME or 'this machine'} holds no CUDA toolkit; set CUDA_HOME to the root of one"
    elif wanted == "auto" and not (named or local_archs(torch)):
        why = "there is no GPU here; RESFUSE_CUDA=1 builds for the release architectures"
    if why and wanted == "1":
        stop(f"RESFUSE_CUDA=1, but {why}.")
    return ([] if why else named or local_archs(torch) or list(RELEASE_ARCHS)), why


def pybind11_include() -> tuple[str | None, str | None]:
    """pybind11's headers, or the reason why the module `_C` is left out."""
    try:
        import pybind11
    except ImportError:
        return None, "pybind11 is not installed"
    return pybind11.get_include(), None


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / "csrc").glob(pattern))


def compiler() -> str:
    """The C++ compiler's own first line about itself, else its name."""
    name = os.environ.get("CXX", "c++")
    return output_of(name, "--version") or name


def openmp_flags() -> list[str]:
    """OpenMP is compiled in but not linked: torch brings the one runtime that both must share.

    clang calls another runtime than torch's; built with it, kernels run on one thread.
    """
    return [] if "clang" in compiler() else ["-fopenmp"]


def extensions(archs: list[str], pybind11: str | None) -> list[Extension]:
    from torch.utils.cpp_extension import include_paths, library_paths

    device = "cuda" if archs else "cpu"
    sanitize = SANITIZE_FLAGS if choice("RESFUSE_SANITIZE", "0", ("0", "1")) == "1" else []
    ops = Extension(
        "resfuse._ops",
        sources("ops.cpp", "cpu/*.cpp", *(["cuda/*.cpp", "cuda/*.cu"] if archs else [])),
        include_dirs=include_paths(device) + [str(ROOT / "csrc" / part) for part in ("", "cuda", "cuda/device")],
        library_dirs=library_paths(device),
        libraries=["c10", "torch", "torch_cpu"] + (["c10_cuda", "torch_cuda", "cudart"] if archs else []),
        extra_compile_args={"cxx": CXX_FLAGS + openmp_flags() + sanitize, "nvcc": NVCC_FLAGS},
        extra_link_args=sanitize[-2:],
        language="c++",
    )
    if pybind11 is None:
        return [ops]
    module = Extension(
        "resfuse._C",
        sources("module.cpp", "launches.cpp", "gate.cpp"),
        include_dirs=[pybind11],
        extra_compile_args={"cxx": CXX_FLAGS},
        libraries=["dl"],  # a part of libc only since glibc 2.34
        language="c++",
    )
    return [ops, module]


def output_of(*command: str) -> str | None:
    """First line that a command prints, None if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def source_hash() -> str:
    files = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*")]
    digest = hashlib.sha256()
    for path in sorted(p for p in files if p.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def build_record(torch, archs: list[str], cuda_why: str | None, module_why: str | None) -> dict:
    return {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
        "python": sys.version.split()[0],
        "compiler": compiler(),
        "flags": " ".join(CXX_FLAGS + openmp_flags()),
        "cuda_archs": archs,
        "cuda_left_out": cuda_why,
        "module_left_out": module_why,
        "sources": source_hash(),
    }


def native_arguments() -> dict:
    """setup()'s arguments for the native library."""
    try:
        import torch
    except ImportError:
        stop(f"building needs torch, which this Python does not have; install it, then run `{INSTALL}`"
             " (without the option pip builds in an environment of its own, where torch is absent).")  # fmt: skip
    from torch.utils.cpp_extension import BuildExtension, is_ninja_available

    archs, cuda_why = cuda_plan(torch)
    pybind11, module_why = pybind11_include()
    if archs:
        os.environ["TORCH_CUDA_ARCH_LIST"] = " ".join(archs)
    record = build_record(torch, archs, cuda_why, module_why)

    class BuildNative(BuildExtension):
        """Builds unless the record beside the library says that it is up to date, then writes the record."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "use_ninja": is_ninja_available()})

        def get_ext_filename(self, name: str) -> str:
            path = super().get_ext_filename(name)
            # The operators hold no Python symbol, so their file carries no Python tag.
            return str(Path(path).with_name("_ops.so")) if name.endswith("_ops") else path

        def run(self) -> None:
            built = [Path(self.get_ext_fullpath(e.name)) for e in self.extensions]
            written = built[0].with_name("_build.json")
            if all(p.exists() for p in built) and written.exists():
                old = json.loads(written.read_text())
                if {k: v for k, v in old.items() if k != "commit"} == record:
                    return
            written.unlink(missing_ok=True)  # an interrupted build leaves no record
            super().run()
            for what, why in (("the CUDA kernels", cuda_why), ("the module of build facts and launches", module_why)):
                if why:
                    print(f"resfuse: {what} left out: {why}")
            commit = output_of("git", "rev-parse", "HEAD")
            written.write_text(json.dumps({**record, "commit": commit}, indent=2) + "\n")

    return {"ext_modules": extensions(archs, pybind11), "cmdclass": {"build_ext": BuildNative}}


native = choice("RESFUSE_NATIVE", "1" if sys.platform == "linux" else "0", ("0", "1"))
setup(**(native_arguments() if native == "1" else {}))
