"""Every measured number in the prose of README and docs is in a results file that its page, or a page that it links to,
names. Tables are compared line by line with what their results files give (`tests/test_readme.py`)."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
UNITS = "ms|us|GiB|GB|TB/s|TFLOP/s|%|images a second|as a graph"
MEASURED = re.compile(rf"(?<![\w.`/-])(\d[\d,]*(?:\.\d+)?)(?:x(?!\w)|\s?(?:{UNITS})(?!\w))")
SCALES = (1, 100, 1e3, 1e6, 1e-6, 1e-9, 1e-12, 2**-30)
# Numbers that are chosen or counted, not measured, by page and as they are written.
CHOSEN = {
    "docs/gpu.md": {
        "80GB",  # a GPU's name
    },
    "docs/roofline.md": {"80GB"},
    "docs/math.md": {"2 %", "5 %"},  # bounds of the cost model
    "docs/triton.md": {
        "4 %",  # 2.25 of 59.7 tensors
        "4.3 TB/s",  # benchmarks/kernels.py, COPY: said to be taken
    },
}
DERIVED = {  # ratios and rates, each made from a results file here
    "docs/roofline.md": ("h100", lambda g: [
        roofline_floor(name) / g["resnet50"][name]["device_ms"] for name in ("eager", "resfuse")
    ]),
}  # fmt: skip


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def roofline_floor(name):
    return results("roofline")["totals"][name]["floor_ms"]


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def known(page, seen=()):
    """Numbers of the results files that a page names, and of those that the pages it links to do."""
    text, found = (ROOT / page).read_text(), []
    for name in re.findall(r"benchmarks/results/([\w-]+)\.json", text):
        found += numbers(results(name))
    for target in re.findall(r"\]\((?!http)([^)#]+\.md)", text) if not seen else ():
        linked = ((ROOT / page).parent / target).resolve().relative_to(ROOT)
        found += known(str(linked), (page,))
    return found


def measured(page):
    """(as it is written, value, decimals) of each number with a unit in a page's prose."""
    for line in (ROOT / page).read_text().splitlines():
        for match in MEASURED.finditer("" if line.startswith("|") else line):
            digits = match[1].replace(",", "")
            yield match[0], float(digits), len(digits.partition(".")[2])


def in_results(value, decimals, there):
    """Whether rounding gives it. Of whole thousands the last digit may be a rounded one: 6,580."""
    step = 10.0**-decimals * (10 if value >= 1000 else 1)
    return any(abs(scale * v - value) <= 0.5001 * step for v in there for scale in SCALES)


@pytest.mark.parametrize("page", PAGES)
def test_numbers_are_in_results_files(page):
    there = known(page)
    if page in DERIVED:
        name, derive = DERIVED[page]
        there += derive(results(name))
    for text, value, decimals in measured(page):
        assert text in CHOSEN.get(page, ()) or in_results(value, decimals, there), f"{page}: {text}"


def test_it_sees_a_wrong_number():
    there = [38.89, 64.6, 0.0123]
    assert in_results(38.89, 2, there) and in_results(12.3, 1, there) and in_results(65, 0, there)
    assert not in_results(38.7, 1, there) and not in_results(13.0, 1, there)
    assert [text for text, *_ in measured("README.md")].count("38.89 ms") == 1


def test_nothing_is_excused_that_is_not_there():
    for page, texts in CHOSEN.items():
        assert texts <= {text for text, *_ in measured(page)}, page
