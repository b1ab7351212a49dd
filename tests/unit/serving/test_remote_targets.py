"""The commands take adapters that are kept elsewhere; what is not there is told in one line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from soka_serve.adapter.source import read_source
from soka_serve.builtin import base_directory
from soka_serve.cli import main
from tests.support.launches import PROJECTION, refused, run_serve, write_small_adapter
from tests.support.remote_stores import WebServer, web_server


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setenv("SOKA_ADAPTER_CACHE", str(tmp_path / "cache"))
    with web_server() as site:
        site.upload(write_small_adapter(tmp_path / "one"), "kept/one")
        yield site


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def test_targets_of_serve(web: WebServer, tmp_path: Path) -> None:
    done = run_serve(f"{web.url}/kept/one", f"two={web.url}/kept/one", "--dry-run")
    assert done.exit_code == 0, done.output
    modules = [word for word in shlex.split(done.output) if str(tmp_path / "cache") in word]
    names, places = zip(*(word.split("=") for word in modules), strict=True)
    assert names == ("one", "two")
    assert places[0] == places[1]
    said = refused(f"{web.url}/kept/none", f"{web.url}/kept/../one", tmp_path / "nothing")
    assert f"{web.url}/kept/none: no adapter_config.json there" in said
    assert "'.' or '..'" in said
    assert "no such file or directory" in said


def test_a_url_of_builds(web: WebServer) -> None:
    done = run_serve("--builds", f"{web.url}/kept", "--base", base_directory(), "--dry-run")
    assert done.exit_code == 0, done.output
    assert f"SOKA_BUILDS={web.url}/kept " in done.output
    assert "SOKA_ADAPTER_ROOTS='' " in done.output  # no folder of this machine
    assert "--max-loras 8" in done.output
    assert "which base" in refused("--builds", f"{web.url}/kept")
    assert "s4://bucket/kept: Protocol not known: s4" in refused("--builds", "s4://bucket/kept", "--base", "tiny")
    for folder in ("hf://owner/name", "hf://owner@v2"):
        assert "expected hf://OWNER" in refused("--builds", folder, "--base", "tiny")
    assert "credentials" in refused("--builds", "https://me:secret@host/kept", "--base", "tiny")


def test_inspect_merge_combine_and_export(web: WebServer, tmp_path: Path) -> None:
    url = f"{web.url}/kept/one"
    assert json.loads(run("inspect", url, "--json"))["modules"][0]["module"] == PROJECTION
    run("merge", f"{url}=0.5", "--base", base_directory(), "--out", tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").is_file()
    run("combine", f"{url}=0.5", url, "--out", tmp_path / "sum")
    lock = read_source(tmp_path / "sum").lock
    assert lock is not None
    assert [lock["combine"]["adapters"][key]["name"] for key in ("adapter0", "adapter1")] == ["one", "one"]
    run("export", url, "--to", "lora", "--rank", "2", "--out", tmp_path / "lora")
    assert web.fetched("adapter_model.safetensors") == 1
    done = CliRunner().invoke(main, ["inspect", f"{url}?signature=secret"])
    assert done.exit_code == 2
    assert "secret" not in done.output
