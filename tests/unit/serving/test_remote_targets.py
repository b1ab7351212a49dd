"""The commands take adapters that are kept elsewhere; what is not there is told in one line."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from soka_serve.adapter.format import read_adapter
from soka_serve.adapter.source import read_source
from soka_serve.builtin import base_directory
from soka_serve.cli import main
from tests.support.launches import PROJECTION, refused, run_serve, write_lora, write_small_adapter
from tests.support.remote_stores import Hub, WebServer, hub, web_server

OTHER = PROJECTION.replace("layers.0", "layers.1")


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setenv("SOKA_ADAPTER_CACHE", str(tmp_path / "cache"))
    with web_server() as site:
        site.upload(write_small_adapter(tmp_path / "one"), "kept/one")
        yield site


@pytest.fixture
def a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("SOKA_ADAPTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with hub(tmp_path / "none") as made:
        yield made


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


def served(*arguments: str | Path) -> dict[str, Path]:
    """Folders of adapters by model name, in the command for vLLM."""
    done = run_serve(*arguments, "--dry-run")
    assert done.exit_code == 0, done.output
    words = shlex.split(done.stdout)
    given = itertools.takewhile(lambda word: "=" in word, words[words.index("--lora-modules") + 1 :])
    return {name: Path(folder) for name, folder in (word.split("=") for word in given)}


def test_hub_ids_as_targets(a_hub: Hub, tmp_path: Path) -> None:
    """Of a tag, a branch and a commit; each is what was pushed there, and named as its repository."""
    first = write_small_adapter(tmp_path / "first")
    commit = a_hub.push("owner/math", first, "v1")
    a_hub.push("owner/math", write_small_adapter(tmp_path / "second", module=OTHER))
    a_hub.push("owner/lora", write_lora(tmp_path / "lora", rank=2))
    found = served("owner/math@v1", "now=owner/math", f"then=owner/math@{commit}", "owner/lora", tmp_path / "first")
    assert list(found) == ["math", "now", "then", "lora", "first"]
    assert all(folder.is_relative_to(tmp_path / "cache") for name, folder in found.items() if name != "first")
    for name, module in {"math": PROJECTION, "now": OTHER, "then": PROJECTION}.items():
        assert list(read_adapter(found[name]).factors) == [module]
    assert "math" in refused("owner/math@v1", "owner/math")  # one name twice


def test_hub_ids_that_cannot_be_served(a_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at once, in one error."""
    a_hub.push("owner/math", write_small_adapter(tmp_path / "math"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    a_hub.push("owner/model", model)
    said = refused("owner/none", "owner/math@v9", "owner/model", "owner/math", tmp_path / "nothing")
    assert [line.startswith("error: ") for line in said.splitlines()].count(True) == 1
    for line in (
        "owner/none: no such file or directory; taken for a hub id: owner/none: not found",
        "owner/math@v9: no such file or directory; taken for a hub id: owner/math@v9: not found",
        "owner/model: no such file or directory; taken for a hub id: owner/model: no adapter_config.json in it",
        f"{tmp_path / 'nothing'}: no such file or directory\n",
    ):
        assert line in said
    a_hub.token = "hf_hunter2"
    said = refused("owner/math")
    assert "HF_TOKEN" in said
    monkeypatch.setenv("HF_TOKEN", "hf_hunter2")
    assert list(served("owner/math")) == ["math"]


def test_a_folder_goes_before_a_hub_id(a_hub: Hub, tmp_path: Path) -> None:
    a_hub.push("owner/math", write_small_adapter(tmp_path / "elsewhere"))
    here = write_small_adapter(tmp_path / "owner" / "math", module=OTHER)
    assert served("owner/math") == {"math": here}
    assert a_hub.site.asked == []


def test_a_hub_that_is_switched_off(a_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched by its commit is served without it, and nothing else."""
    commit = a_hub.push("owner/math", write_small_adapter(tmp_path / "math"))
    before = served(f"owner/math@{commit}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    a_hub.site.asked.clear()
    assert served(f"owner/math@{commit}") == before
    said = refused("owner/math@v1")
    assert "owner/math@v1: no such file or directory; taken for a hub id: " in said
    assert "HF_HUB_OFFLINE" in said
    assert a_hub.site.asked == []


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
