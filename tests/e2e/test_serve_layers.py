"""The plugin in vLLM: its layers, and what it rebinds, which is what its table says, in every process of vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from soka_vllm.hooks import HOOKS, signatures
from soka_vllm.sources import version_of
from tests.conftest import NEEDS_VLLM, ROOT
from tests.support import preloaded
from tests.support.releases import of_each, sources_of, unpacked

CASES = ["1", "2", "2 fully-sharded", "4", "4 fully-sharded"]


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each case wrote: in one process of its own, which vLLM's import changes (logging, torch's settings)."""
    done = preloaded.run("vllm", ["tests.support.serve_layers", *CASES], cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = [part.partition(":") for part in done.stdout.split("case ")[1:]]
    return {case: text if "right" in text else text + done.stderr[-3000:] for case, _, text in parts}


@pytest.mark.slow
@NEEDS_VLLM
@pytest.mark.parametrize("case", CASES)
def test_layers(said: dict[str, str], case: str) -> None:
    """With 1, 2 and 4 ranks (4 are more than the key/value heads)."""
    assert said[case].split()[-1:] == ["right"], said[case]
    assert said[case].count("7 layers checked") == int(case.split()[0])


# --- what is rebound --------------------------------------------------------------------------------------------------


pytestmark = [pytest.mark.slow, NEEDS_VLLM]


def test_the_table_names_all_that_is_rebound() -> None:
    done = preloaded.run("vllm", ["tests.support.hooked", "all"], cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_modules_that_are_imported_later_are_rebound() -> None:
    modules = ("vllm.v1.engine.core", "vllm.entrypoints.openai.models.serving", "vllm.v1.metrics.prometheus")
    command = [sys.executable, "-m", "tests.support.hooked", *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


@of_each
@pytest.mark.parametrize(
    ("program", "said"),
    [
        (["tests.support.hooked", "all"], ""),
        (["tests.support.serve_layers", *CASES], "rank 3: 7 layers checked"),
    ],
    ids=["rebound", "layers"],
)
def test_a_release_that_is_not_installed(place: Path, program: list[str], said: str, tmp_path: Path) -> None:
    """Its Python files, with the torch that is installed: its layers take adapters, and its names are rebound."""
    files = unpacked(place, tmp_path)
    paths = [str(files), str(ROOT), str(ROOT / "plugins")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.unbuilt", *program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"vLLM {version_of(sources_of(place))}\n" in done.stdout
    assert said in done.stdout
    assert "wrong" not in done.stdout, done.stderr[-3000:]


def test_a_name_has_one_row() -> None:
    names = [(hook.module, hook.name) for hook in HOOKS]
    assert len(set(names)) == len(names)
    signed = [(signature.module, signature.name) for signature in signatures("0.33.0")]
    assert len(set(signed)) == len(signed)
