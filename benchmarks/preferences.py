"""Lines for resfuse/kernels/measured.py from what `make gpu` measured:

python -m benchmarks.preferences primitives.json
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from resfuse.kernels import dispatch

SETS = ("triton", "cuda")
LEAST = 1.05  # the second in order is preferred where it is so much faster


def lines(results: dict, file: str) -> list[str]:
    """One for each dtype and primitive, of its times summed over the cases in which both sets ran."""
    environment = results["environment"]
    capability = environment["gpu"]["capability"].replace(".", ", ")
    times: dict = defaultdict(dict)
    for row in results["rows"]:
        if row["set"] in SETS and "3x3" not in row["primitive"]:
            times[row["dtype"], row["primitive"], row["case"]][row["set"]] = row["median"]
    sums: dict = defaultdict(lambda: dict.fromkeys(SETS, 0.0))
    for (dtype, primitive, _), each in times.items():
        if len(each) == len(SETS):
            for name, median in each.items():
                sums[dtype, primitive.partition(",")[0]][name] += median
    found = []
    for (dtype, primitive), each in sums.items():
        first, second = sorted(SETS, key=dispatch.ORDER.index)
        ratio = each[first] / each[second]
        if ratio >= LEAST:
            why = f"{ratio:.2f}x {first}, {environment['device']}, {environment['commit']}, {file}"
            found.append(f'Preference(({capability}), torch.{dtype}, "{primitive}", "{second}", "{why}"),')
    return found


if __name__ == "__main__":
    path = Path(sys.argv[1])
    print("\n".join(lines(json.loads(path.read_text()), path.name)))
