"""What a device reaches at most: bytes a second to and from its memory, and operations a second of its products."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Ceilings:
    """bandwidth: bytes read and written a second; rates: operations a second by storage dtype, two for a multiply-add,
    without sparsity; of float32 those of tf32, which torch's convolutions use. source: where the numbers are from."""

    device: str
    bandwidth: float
    rates: Mapping[str, float]
    source: str

    def seconds(self, moved: int, operations: int, dtype: str) -> float:
        """The least time for so many bytes and operations, at once. ValueError where the rate is not known."""
        if dtype not in self.rates:
            raise ValueError(f"{self.source} has no rate of {dtype} products; it has {', '.join(self.rates)}")
        return max(moved / self.bandwidth, operations / self.rates[dtype])


def _sheet(device: str, name: str, bandwidth: float, half: float, tf32: float) -> Ceilings:
    rates = {"bfloat16": half, "float16": half, "float32": tf32}
    return Ceilings(device, bandwidth, rates, f"NVIDIA's data sheet of the {name}, not measured")


# Dense rates: the sheets print those with sparsity, which are twice as much.
SHEETS = {
    "a100": _sheet("a100", "A100 80GB SXM", 2.039e12, 312e12, 156e12),
    "h100": _sheet("h100", "H100 SXM", 3.35e12, 989e12, 494e12),
    "h200": _sheet("h200", "H200 SXM", 4.8e12, 989e12, 494e12),
    "b200": _sheet("b200", "B200 (HGX)", 8e12, 2250e12, 1125e12),
}


def measured(path: Path) -> Ceilings:
    """From a results file that has the part `ceilings` of `make gpu`: a device-to-device copy and square products."""
    results = json.loads(path.read_text())
    if "copy" not in results:
        raise ValueError(f"{path} has no ceilings: make gpu PARTS=ceilings measures them")
    rates = {
        dtype: 1e12 * results[f"matmul_{dtype}"]["tflop_s"] for dtype in DTYPES if f"matmul_{dtype}" in results
    }  # fmt: skip
    facts = results["environment"]
    source = f"a copy and a matrix product measured on {facts['device']} at {facts['commit']}, {path.name}"
    return Ceilings(facts["device"], 1e12 * results["copy"]["tb_s"], rates, source)
