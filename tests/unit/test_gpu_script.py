"""`eval/gpu.sh`: what it has installed, and that what it measures is on the disk before its time is over."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from eval.bench import apply, kpsvd


def needs(names: set[str]) -> set[str]:
    """Packages and all that they need, as far as they are installed."""
    found: set[str] = set()
    open_ones = set(names)
    while open_ones:
        name = open_ones.pop()
        found.add(name)
        try:
            said = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for wanted in map(Requirement, said):
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                open_ones |= {canonicalize_name(wanted.name)} - found
    return found


def benches(text: str) -> set[str]:
    """The modules of eval/bench that the script runs."""
    return set(re.findall(r"^ +bench \w+ \d+ (\w+)", text, re.MULTILINE))


def test_what_it_downloads_is_complete(root: Path) -> None:
    """Beside what the machine has; the benchmark of a step runs LyCORIS's layers."""
    text = (root / "eval" / "gpu.sh").read_text()
    words = re.search(r"pip download (.*?) # here", text, re.DOTALL)
    assert words is not None
    listed = {
        canonicalize_name(Requirement(word.strip('"')).name)
        for word in words[1].split("-d wheels ")[1].split()
        if word not in ("#", "\\")
    }
    assert {"peft", "pytest", "lycoris-lora"} <= listed
    there = needs({"torch", "transformers", "accelerate", "triton"})
    assert needs(listed) - there - listed == set()


def test_its_benchmarks_write_after_each_case(root: Path) -> None:
    found = benches((root / "eval" / "gpu.sh").read_text())
    assert found == {"kernel", "blocks", "kpsvd", "step", "apply"}
    for name in sorted(found):
        tree = ast.parse((root / "eval" / "bench" / f"{name}.py").read_text())
        (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
        assert any(_calls(loop, "write_record") for loop in ast.walk(main) if isinstance(loop, ast.For)), name


def _calls(tree: ast.AST, name: str) -> bool:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(isinstance(called, ast.Name) and called.id == name for called in calls)


@pytest.mark.parametrize(
    ("module", "cases", "options", "step"),
    [
        (apply, [(32, 32, (1,), (4,)), (64, 32, (1,), (4,))], ["--repeats", "1", "--dtypes", "float32"], "measure"),
        (kpsvd, [("random", 64, 64), ("random", 96, 64)], ["--rank", "2", "--threads", "1"], "compare"),
    ],
    ids=["apply", "kpsvd"],
)
def test_what_was_measured_before_an_end_is_there(
    module: Any, cases: list[Any], options: list[str], step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended in the second case, as by the limit of time."""
    measured, out = getattr(module, step), tmp_path / "out.json"
    turns = iter([True, False])

    def ended(*arguments: Any) -> Any:
        if not next(turns):
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(module, "CASES", cases)
    monkeypatch.setattr(module, step, ended)
    monkeypatch.setattr("sys.argv", ["bench", *options, "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        module.main()
    assert len(json.loads(out.read_text())["rows"]) == 1


def test_the_kpsvd_has_each_shape_of_a_7b() -> None:
    assert {(rows, columns) for _, rows, columns in kpsvd.CASES} == {(4096, 4096), (11008, 4096), (4096, 11008)}


def test_it_says_where_its_log_is(root: Path, tmp_path: Path) -> None:
    """Without time all steps are left out."""
    out, given = tmp_path / "out", {**os.environ, "SOKA_GPU_SECONDS": "0", "PYTHON": "true"}
    done = subprocess.run(
        ["bash", "eval/gpu.sh", str(out), "--prove"], cwd=root, env=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1  # no step was run: whether the kernel is right is not known
    assert done.stdout.endswith(f"== what each step wrote: {out / 'gpu.log'}\n")
    assert "oracle: left out" in (out / "gpu.log").read_text()
    wrong = subprocess.run(["bash", "eval/gpu.sh", str(out), "--prov"], cwd=root, capture_output=True, check=False)
    assert wrong.returncode == 2
