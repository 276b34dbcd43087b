"""The products on a matrix unit, on a model of it: few processors have one."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gate, pytest.mark.slow]

HERE = Path(__file__).parent


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiler_missing: compiles the model")
def test_products_on_a_model_of_the_unit(tmp_path):
    """Rows, columns and depths with edges, operands by rows, by columns and at any place, nothing read behind them."""
    program = tmp_path / "amx_model"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    build = ["g++", *flags, str(HERE / "amx_model.cpp"), "-o", str(program)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
