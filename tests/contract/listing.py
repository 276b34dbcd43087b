"""docs/compatibility.md's list, from the names of the tests: python tests/contract/listing.py"""

import re
from pathlib import Path

HERE = Path(__file__).parent
TEST = re.compile(r"^def test_(\d\d)_(\w+)", re.MULTILINE)


def lines() -> list[str]:
    found = []
    for path in sorted([*HERE.glob("test_*.py"), *HERE.parent.glob("test_*.py")]):
        for number, name in TEST.findall(path.read_text()):
            found.append((number, name.replace("_", " "), path.name))
    return [f"| {number} | {text} | `{file}` |" for number, text, file in sorted(found)]


if __name__ == "__main__":
    print("\n".join(lines()))
