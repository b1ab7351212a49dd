"""The README's list of modules is the list of modules."""

from __future__ import annotations

import re
from pathlib import Path


def test_the_tree_names_every_module_and_no_other(root: Path) -> None:
    text = (root / "README.md").read_text()
    tree = text[text.index("```text\nsoka_serve/") : text.index("plugins/  ")]
    # The first column of each line: names up to two or more spaces.
    columns = [re.split(r"\s{2,}", line.strip())[0] for line in tree.splitlines()]
    named = {name for column in columns for name in re.findall(r"\w+\.py", column)}
    there = {path.name for path in (root / "soka_serve").glob("*.py")} - {"__init__.py"}
    assert named == there
