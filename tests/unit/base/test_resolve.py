"""Where a base comes from: a directory, or the hub with its errors."""

from __future__ import annotations

import importlib
import logging
import shutil
from pathlib import Path

import pytest

from soka_serve import build, plan
from soka_serve.base import hub
from soka_serve.base.resolve import resolve_base
from soka_serve.builtin import base_directory
from soka_serve.errors import CheckpointError
from soka_serve.manifest.schema import Base


def test_base_from_a_path(tmp_path: Path) -> None:
    single = Path(shutil.copytree(base_directory(), tmp_path / "single"))
    base = Base(path="single")
    assert resolve_base(base, manifest_dir=tmp_path).directory == single
    (single / "model.safetensors").unlink()
    assert resolve_base(base, manifest_dir=tmp_path, weights=False).directory == single
    with pytest.raises(CheckpointError, match="no weights"):
        resolve_base(base, manifest_dir=tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve_base(Base(path="other"), manifest_dir=tmp_path, weights=False)


def test_an_error_names_the_key_of_the_manifest(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.write_text('schema = 1\n[base]\npath = "other"\n[train.data]\nbuiltin = "math"\n')
    for call in (plan, build):
        with pytest.raises(CheckpointError) as caught:
            call(file)
        assert caught.value.message == f"{file}:3:8: base.path: {tmp_path / 'other'}: no such directory"


def hub_error(name: str) -> Exception:
    """One of huggingface_hub's own errors, as the library makes it from a response."""
    from huggingface_hub import errors

    httpx = importlib.import_module(errors.Response.__module__.partition(".")[0])  # or httpx2, from 2.0 on
    kind = getattr(errors, name)
    if not issubclass(kind, errors.HfHubHTTPError):
        return kind("no")  # type: ignore[no-any-return]
    response = httpx.Response(403, request=httpx.Request("GET", "https://hub.example/x"))
    return kind("no", response=response)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        ("GatedRepoError", "'owner/name' at revision 'v1' is gated", "hf auth login"),
        ("RevisionNotFoundError", "'owner/name' at revision 'v1': no such revision", "branch, tag or commit"),
        ("RepositoryNotFoundError", "'owner/name' at revision 'v1': not found", "check the id"),
        ("LocalEntryNotFoundError", "cannot be reached", "HF_HUB_OFFLINE"),
        ("OfflineModeIsEnabled", "cannot be reached", "base.path"),
        ("HfHubHTTPError", "cannot be reached", "network"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str, message: str, hint: str) -> None:
    def fail(*_: object, **__: object) -> str:
        raise hub_error(error)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_base(Base(hub="owner/name", revision="v1"), manifest_dir=tmp_path)
    assert hint in str(caught.value.hint)


def test_hub_offline_without_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library, offline (tests/conftest.py sets HF_HUB_OFFLINE)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="'owner/no-such-model' cannot be reached, and is not in the local cache"):
        resolve_base(Base(hub="owner/no-such-model"), manifest_dir=tmp_path)
    with pytest.raises(CheckpointError, match="not a valid id"):
        resolve_base(Base(hub="no/such/id"), manifest_dir=tmp_path)


def test_bundled_config_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundled = tmp_path / "owner--no-such-model"
    bundled.mkdir()
    (bundled / "config.json").write_text("{}")
    monkeypatch.setattr(hub, "_BUNDLED", tmp_path)
    base = Base(hub="owner/no-such-model")
    with caplog.at_level(logging.WARNING):
        assert resolve_base(base, manifest_dir=tmp_path, weights=False).directory == bundled
    assert "cannot be reached; planning with the config inside the package" in caplog.text
    with pytest.raises(CheckpointError, match="cannot be reached"):
        resolve_base(base, manifest_dir=tmp_path)
