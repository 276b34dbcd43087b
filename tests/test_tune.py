"""Launch choices tuned with the interpreter in a GPU's place and a clock that prefers what the test says."""

import io

import pytest
import torch
from rich.console import Console
from units import TRITON, triton_kernels

from resfuse.bench import command, tune
from resfuse.kernels.triton import _table
from resfuse.kernels.triton._table import Own, Tile
from resfuse.testing.cases import CASES

pytestmark = TRITON
CPU = torch.device("cpu")
TILE = Tile(64, 64, 32, 8, 3, "")


def test_neighbours_differ_in_one_size_or_a_side_and_the_warps():
    found = [(t.rows, t.channels, t.depth, t.warps, t.stages) for t in tune.neighbours(TILE)]
    assert found == [
        (32, 64, 32, 8, 3), (128, 64, 32, 8, 3), (64, 32, 32, 8, 3), (64, 128, 32, 8, 3), (64, 64, 64, 8, 3),
        (64, 64, 32, 4, 3), (64, 64, 32, 16, 3), (64, 64, 32, 8, 2), (64, 64, 32, 8, 4),
        (32, 64, 32, 4, 3), (128, 64, 32, 16, 3), (64, 32, 32, 4, 3), (64, 128, 32, 16, 3),
    ]  # fmt: skip
    assert {t.stages for t in tune.neighbours(Tile(64, 64, 0, 4, 3, ""))} == {2, 3, 4}  # rows block by block
    assert all(t.depth == 0 and t.stages == 1 for t in tune.neighbours(Tile(64, 64, 0, 4, 1, "")))
    assert not any(t.rows * t.channels > tune.LARGEST for t in tune.neighbours(Tile(128, 256, 32, 8, 3, "")))


@pytest.fixture
def noted(monkeypatch):
    with triton_kernels(monkeypatch):
        yield tune.note([CASES["small-projection"]], torch.float32, CPU)


def test_a_step_is_noted(noted):
    asked = {key.primitive for call in noted for key in call.tiles}
    assert {"conv_stats", "expand", "covariance", "outer_product", "conv_backward", "conv_window"} <= asked
    kernels = {own.kernel for call in noted for own in call.windows}
    assert kernels == {"conv_window", "conv_window_dgrad", "conv_window_wgrad"}


@pytest.mark.slow
def test_the_fastest_tile_is_found_and_used(monkeypatch):
    """A clock by which more rows and 16 warps are faster, and a window of ours than the vendor's."""
    used = set()

    def timer(calls):
        next(iter(calls.values()))()  # they run
        if set(calls) == {False, True}:
            return {False: 2.0, True: 1.0}
        used.update(calls)
        return {tile: 1 / (tile.rows * tile.warps) for tile in calls if tile.rows < 256}  # 256 does not compile

    with triton_kernels(monkeypatch):
        monkeypatch.setattr(_table, "ours", lambda *_: False)
        choices = tune.tune([CASES["small-identity"]], torch.float32, CPU, timer)
    tiles = {choice.key.primitive: choice for choice in choices if isinstance(choice.key, tune.Key)}
    assert (tiles["expand"].chosen.rows, tiles["expand"].chosen.warps) == (128, 16)
    before = _table.tile("expand", torch.float32, 32, 80)
    assert tiles["expand"].gain == pytest.approx(128 * 16 / (before.rows * before.warps))
    assert {c.key.kernel for c in choices if isinstance(c.key, Own) and c.chosen} == {
        "conv_window", "conv_window_dgrad", "conv_window_wgrad"
    }  # fmt: skip
    out = io.StringIO()
    tune.show(choices, "a GPU", 90, Console(file=out, width=200))
    rule = next(line for line in out.getvalue().splitlines() if line.startswith('    "expand": '))
    names = {"Rule": _table.Rule, "Tile": Tile}
    ((name, written),) = eval("{" + rule.strip() + "}", names).items()
    assert name == "expand" and written.fits(torch.float32, 32, 90, 1) and written.tile.rows == 128


@pytest.mark.slow
def test_results_do_not_depend_on_the_tile(monkeypatch):
    """What is timed is the same computation."""
    results = []

    def timer(calls):
        return {name: call() or 1.0 for name, call in calls.items()}

    with triton_kernels(monkeypatch):
        noted = tune.note([CASES["small-projection"]], torch.float32, CPU)
        key, call = next((key, c) for c in noted for key in c.tiles if key.primitive == "covariance")
        first = _table.tile(*key[:3], 80, key.outer)
        for tile in (first, *tune.neighbours(first)):
            with tune._table_with(set(), set(), {key: tile}):
                results.append(call.repeat()[1])
        assert tune._climbed(key, [call], timer, 80).gain == 1.0
    assert len(results) > 3 and all(torch.allclose(r, results[0], rtol=1e-5) for r in results)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="tune needs a GPU"):
        command.main(["tune"])


@pytest.mark.gpu
def test_on_a_gpu():
    device = torch.device("cuda", 0)
    choices = tune.tune([CASES["small-identity"]], torch.bfloat16, device, tune.gpu_timer(device, 0.2))
    assert all(choice.gain >= tune.LEAST_GAIN for choice in choices)
