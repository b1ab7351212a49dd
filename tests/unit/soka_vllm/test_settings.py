"""Settings of the plugin, and what vLLM's cache of compiled graphs knows of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from soka_vllm import settings
from soka_vllm.hooks import rows
from soka_vllm.settings import METRICS_VARIABLE
from soka_vllm.sources import installed_sources, version_of
from tests.conftest import NEEDS_VLLM, ROOT


def _stock() -> dict[str, object]:
    return {"VLLM_SOMETHING": 1}


def _key() -> dict[str, object]:
    return settings.compile_factors(_stock)


@pytest.mark.parametrize(("name", "value"), [("SOKA_LORA", "0"), ("SOKA_SLOT_PARAMETERS", "7")])
def test_what_is_in_a_compiled_graph_is_in_its_key(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    before = _key()
    assert before.items() > _stock().items()
    assert before["soka_vllm"]
    monkeypatch.setenv(name, value)
    assert _key() != before
    monkeypatch.setenv("SOKA_SUMS", "3")  # of no graph
    after = _key()
    monkeypatch.delenv("SOKA_SUMS")
    assert _key() == after


_INSTALLED = """\
import os, subprocess, sys
from prometheus_client import REGISTRY
from soka_vllm import hooks, metrics
hooks.install()
shown = [c for c in REGISTRY._collector_to_names if isinstance(c, metrics.WorkerCollector)]
print(os.environ["SOKA_METRICS_DIR"], len(shown), flush=True)
if sys.argv[1:]:
    subprocess.run([sys.executable, "-W", "ignore", "-c", sys.argv[1]], check=True)
"""


@NEEDS_VLLM
def test_a_folder_of_a_users_does_not_hide_the_workers_metrics(tmp_path: Path) -> None:
    """A server's first process makes a folder and shows what is in it; the others find it in their variable."""
    command = [sys.executable, "-W", "ignore", "-c", _INSTALLED, _INSTALLED]
    environment = {**os.environ, METRICS_VARIABLE: str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    (first, shown), (second, shown_again) = (line.split() for line in done.stdout.splitlines())
    assert first == second != str(tmp_path)
    assert (shown, shown_again) == ("1", "0")


@NEEDS_VLLM
def test_vllm_asks_there_for_both_of_its_caches() -> None:
    found = installed_sources()
    for module, name in (
        ("vllm.compilation.caching", "aot_compile_hash_factors"),
        ("vllm.compilation.backends", "VllmBackend.__call__"),
    ):
        assert "compile_factors" in found.attributes(module, name)
    row = next(hook for hook in rows(version_of(found)) if hook.name == "compile_factors")
    assert (row.module, row.replacement) == ("vllm.envs", "soka_vllm.settings:compile_factors")
