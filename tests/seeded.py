"""Bugs put into the CUDA set's sources: what the emulator, or the numbers, say of them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from units import EMULATED

from resfuse.testing import emulator

CHECK = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import {module}
from resfuse.testing import cuda
library = cuda.load(Path(sys.argv[2]))
with cuda.emulated(library=library):
    found = {module}.everything()
torch.save(found, sys.argv[3])
"""


def tests(module: str, bugs, sample=()):
    """A fixture `expected`, what a test module's `everything` gives, and a test that each bug changes it or is told of.

    bugs: (file, what stands there, what stands there instead, what is said, "|" between words); those that are not in
    the sample are slow.
    """

    @pytest.fixture(scope="session")
    def expected(tmp_path_factory):
        return run(module, emulator.CSRC / "cuda", tmp_path_factory.mktemp("right"))

    marks = [() if i in sample else pytest.mark.slow for i in range(len(bugs))]
    names = [f"{file}: {text.strip().splitlines()[0]}" for file, text, _, _ in bugs]
    named = [pytest.param(bug, marks=mark, id=name) for bug, mark, name in zip(bugs, marks, names, strict=True)]

    @EMULATED
    @pytest.mark.parametrize("bug", named)
    def test_a_bug_is_seen(bug, expected, tmp_path):
        check_seen(bug, module, expected, tmp_path)

    return expected, test_a_bug_is_seen


def run(module: str, sources: Path, folder: Path):
    """What a test module's `everything` gives with the kernels of a folder, in a process of its own; its error text
    where it fails."""
    to = folder / "found.pt"
    command = [sys.executable, "-c", CHECK.format(module=module), str(Path(__file__).parent), str(sources), str(to)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return torch.load(to) if done.returncode == 0 else done.stderr


def check_seen(bug, module: str, expected, folder: Path) -> None:
    file, text, instead, says = bug
    shutil.copytree(emulator.CSRC / "cuda", folder / "cuda")
    path = folder / "cuda" / file
    source = path.read_text()
    assert source.count(text) == 1, f"the bug fits {source.count(text)} places"
    path.write_text(source.replace(text, instead))
    found = run(module, folder / "cuda", folder)
    if not isinstance(found, str):
        same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, expected, strict=True))
        found = "nothing" if same else "numbers"
    assert any(word in found for word in says.split("|")), found[-2000:]
