"""Each layer imports only layers to its right; kernel sets import the interface and the vendor's convolutions alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import resfuse

ROOT = Path(resfuse.__file__).parent
LAYERS = (
    "convert", "memory", "blocks", "functional", "graph", "lean", "calls", "arguments", "functions", "kernels.dispatch",
    "kernels.measured", "kernels.rounding", "kernels.nvidia", "kernels.interface",
)  # fmt: skip

OF_SETS = (
    *(f"kernels.{name}" for name in ("interface", "vendor", "flat", "nvidia", "rounding")), "_native",
)  # fmt: skip


def modules() -> dict[str, Path]:
    names = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(name: str, path: Path) -> set[str]:
    """Our own modules that a file imports anywhere in it, relative to the package; functions' imports too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("resfuse.") for a in node.names if a.name.startswith("resfuse.")}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1] if package != [""] else []
            elif (node.module or "").split(".")[0] == "resfuse":
                base = []
            else:
                continue
            target = [*base, *(node.module or "").removeprefix("resfuse").strip(".").split(".")]
            target = [part for part in target if part]
            for alias in node.names:
                full = ".".join([*target, alias.name])
                found.add(full if full in known else ".".join(target))
    return found


def layer(name: str) -> str | None:
    return next((known for known in LAYERS if name == known or name.startswith(known + ".")), None)


@pytest.mark.parametrize("name", [n for n in modules() if layer(n)])
def test_imports_only_to_the_right(name):
    own = LAYERS.index(layer(name))
    for target in imports(name, modules()[name]):
        compiled = (name, target) == ("blocks.gate", "_native")
        assert layer(target) or compiled or target == "kernels", f"{name} imports {target or 'resfuse'}"
        if layer(target):
            assert LAYERS.index(layer(target)) >= own, f"{name} imports {target}, which lies to its left"


SETS = sorted(p.parent.name for p in (ROOT / "kernels").glob("*/__init__.py"))


@pytest.mark.parametrize("kernel_set", SETS)
def test_kernel_sets_know_only_the_interface_and_the_vendor(kernel_set):
    prefix = f"kernels.{kernel_set}"
    for name, path in modules().items():
        if name == prefix or name.startswith(prefix + "."):
            for target in imports(name, path):
                own = target == prefix or target.startswith(prefix + ".")
                assert own or target in OF_SETS, f"{name} imports {target}"
            assert "autograd" not in path.read_text(), f"{name} speaks of autograd"


@pytest.mark.parametrize("kernel_set", SETS)
def test_a_set_has_one_module_per_primitive_it_names(kernel_set):
    from resfuse.kernels import dispatch

    for primitive in dispatch.kernel_set(kernel_set).PRIMITIVES:
        assert (ROOT / "kernels" / kernel_set / f"{primitive}.py").exists()


def test_every_primitive_is_in_the_eager_set():
    from resfuse.kernels import eager, interface

    assert set(eager.PRIMITIVES) == set(interface.PRIMITIVES) and len(interface.PRIMITIVES) > 15


def test_reference_imports_torch_alone_and_only_tools_import_it():
    assert imports("reference", ROOT / "reference.py") == set()
    for name, path in modules().items():
        if name.split(".")[0] not in ("testing", "bench"):
            assert "reference" not in imports(name, path)


def test_importing_loads_no_kernels_and_no_model_library():
    code = (
        "import sys, resfuse; loaded = [m for m in sys.modules if m.split('.')[0] in ('triton', 'torchvision', 'timm')"
        " or m.startswith(('resfuse.kernels.eager', 'resfuse.kernels.cpu', 'resfuse._ops', 'resfuse._C'))];"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_a_block_of_a_library_that_is_not_there_says_so():
    code = "import sys, resfuse; sys.path = [p for p in sys.path if 'site-packages' not in p]; resfuse.Bottleneck"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert "torchvision is not installed: pip install torchvision" in done.stderr
