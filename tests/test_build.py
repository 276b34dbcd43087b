"""Packaging: what setup.py builds, refuses and records, and what the record refuses to load."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import resfuse
from resfuse import _native
from resfuse.kernels.interface import Unsupported

ROOT = Path(resfuse.__file__).parent.parent
BUILT = os.environ.get("RESFUSE_NATIVE", "1" if sys.platform == "linux" else "0") == "1"
needs_library = pytest.mark.skipif(not BUILT, reason="native_missing: RESFUSE_NATIVE=0")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="installed without its source folder")


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what a build reads, the built library included."""
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("csrc", "resfuse"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    return tmp_path


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    return python("setup.py", "-q", "build_ext", "--inplace", cwd=tree, **environment)


def last_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_pure_python_wheel_imports_and_says_what_it_lacks(tree):
    options = ("-q", "--no-build-isolation", "--no-deps", "--no-index", "-w", "dist", ".")
    done = python("-m", "pip", "wheel", *options, cwd=tree, RESFUSE_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name == f"resfuse-{resfuse.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert not [n for n in archive.namelist() if n.endswith((".so", "_build.json"))]
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
        archive.extractall(tree / "site")
    assert re.search(r"^Requires-Dist: torch", metadata, re.M) and re.search(r"^Requires-Dist: rich", metadata, re.M)
    code = "from resfuse import _native; print(*[r.code for r in _native.unavailable()], _native.build_facts())"
    done = python("-c", code, cwd=tree / "site")
    assert done.stdout.split() == ["native_missing", "{}"], done.stderr


def test_without_torch_setup_stops_with_one_sentence(tree):
    (tree / "absent").mkdir()
    (tree / "absent" / "torch.py").write_text("raise ImportError('absent')\n")
    done = build(tree, PYTHONPATH=str(tree / "absent"))
    assert done.stderr.strip() == last_line(done)
    assert "needs torch" in last_line(done) and "pip install --no-build-isolation ." in last_line(done)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RESFUSE_NATIVE": "yes"}, "RESFUSE_NATIVE='yes' is not one of 0, 1"),
        ({"RESFUSE_NATIVE": "1", "RESFUSE_CUDA": "2"}, "RESFUSE_CUDA='2' is not one of 0, 1, auto"),
        ({"RESFUSE_NATIVE": "1", "RESFUSE_CUDA": "1"}, "RESFUSE_CUDA=1, but this version of resfuse has no CUDA"),
    ],
)
def test_settings_that_cannot_be_met_stop_with_a_sentence(tree, environment, sentence):
    shutil.rmtree(tree / "csrc" / "cuda", ignore_errors=True)
    assert sentence in last_line(build(tree, **environment))


def test_cuda_without_a_toolkit_stops_with_a_sentence(tree):
    (tree / "csrc" / "cuda").mkdir(exist_ok=True)
    (tree / "csrc" / "cuda" / "empty.cu").touch()
    line = last_line(build(tree, RESFUSE_NATIVE="1", RESFUSE_CUDA="1", CUDA_HOME=str(tree)))
    assert "RESFUSE_CUDA=1, but" in line
    if torch.version.cuda is not None:
        assert f"{tree} holds no CUDA toolkit" in line


@needs_library
def test_record_tells_what_the_library_was_built_for():
    facts = _native.build_facts()
    assert facts["torch"] == torch.__version__ and facts["torch_cuda"] == torch.version.cuda
    assert facts["cxx11_abi"] == torch.compiled_with_cxx11_abi()
    assert facts["compiler"] and "-ffp-contract=off" in facts["flags"]
    assert facts["cuda_archs"] or facts["cuda_left_out"]
    assert facts["module_left_out"] or facts["cplusplus"] >= 201703


@needs_library
def test_up_to_date_library_is_kept_and_a_failed_build_leaves_no_record(tree):
    library, record = tree / "resfuse" / "_ops.so", tree / "resfuse" / "_build.json"
    recorded = json.loads((ROOT / "resfuse" / "_build.json").read_text())
    before = library.stat().st_mtime_ns
    assert build(tree).returncode == 0
    assert library.stat().st_mtime_ns == before, "rebuilt: the sources changed after the last `make build`"
    assert json.loads(record.read_text()) == recorded
    (tree / "csrc" / "ops.cpp").write_text("#error changed\n")
    done = build(tree)
    assert done.returncode != 0 and "#error changed" in done.stdout + done.stderr
    assert not record.exists()


@pytest.fixture
def fresh_native():
    """The module's answers are cached; forget them before and after."""
    for cached in (_native.unavailable, _native.load, _native.module):
        cached.cache_clear()
    yield
    for cached in (_native.unavailable, _native.load, _native.module):
        cached.cache_clear()


@needs_library
@pytest.mark.parametrize(("key", "value"), [("torch", "2.7.0"), ("torch_cuda", "1.0"), ("cxx11_abi", False)])
def test_another_torch_is_refused_with_the_command_that_rebuilds(key, value, tmp_path, monkeypatch, fresh_native):
    record = json.loads(_native.RECORD.read_text())
    altered = tmp_path / "_build.json"
    altered.write_text(json.dumps({**record, key: value}))
    monkeypatch.setattr(_native, "RECORD", altered)
    with pytest.raises(Unsupported) as caught:
        _native.load()
    (reason,) = caught.value.reasons
    assert reason.code == "native_torch_mismatch"
    assert "\n" not in reason.text and _native.REBUILD in reason.text
    assert f"torch {torch.__version__}" in reason.text


@needs_library
def test_library_that_does_not_load_is_a_reason(tmp_path, monkeypatch, fresh_native):
    broken = tmp_path / "_ops.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(_native, "LIBRARY", broken)
    with pytest.raises(Unsupported, match="native_load_failed"):
        _native.load()


@needs_library
def test_native_code_is_loaded_at_first_use_and_brings_no_second_openmp():
    code = """
import re, resfuse
from resfuse import _native
import resfuse.kernels.cpu
mapped = lambda: set(re.findall(r"/\\S+[.]so[.\\d]*", open("/proc/self/maps").read()))
print(any("_ops.so" in path for path in mapped()), _native.unavailable())
_native.load()
print(any("_ops.so" in path for path in mapped()), sum("gomp" in p or "iomp" in p for p in mapped()))
"""
    done = python("-c", code, cwd=ROOT)
    assert done.stdout.split() == ["False", "()", "True", "1"], done.stdout + done.stderr
