"""Adapters from an S3 server: as a target, by name below a URL, and loaded over HTTP; none from anywhere else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from soka_serve.builtin import base_directory
from soka_serve.io.file_names import WEIGHTS_FILE
from tests.support.remote_stores import S3Server, s3_server
from tests.support.serve_adapters import ALPHA, BETA, PROMPTS, AdapterServer, write_soka
from tests.support.serve_command import Command
from tests.support.serving import Server, base_model, random_factors

pytestmark = pytest.mark.slow


@dataclass
class Remote:
    """The server, its store, and the cache's folder."""

    served: AdapterServer
    store: S3Server
    cache: Path
    output: Path


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    folder = tmp_path_factory.mktemp("remote")
    references = {"base": base_model()}
    with s3_server(folder) as store:
        for i, (name, shapes, key) in enumerate(
            [
                ("first", ALPHA, "kept/first"),
                ("second", BETA, "builds/second/adapter"),
                ("third", ALPHA, "builds/third"),
            ]
        ):
            references[name] = write_soka(folder / name, random_factors(shapes, 1, seed=i, scale=0.08))
            store.upload(folder / name, key)
        pickled = folder / "pickled"
        shutil.copytree(folder / "first", pickled)
        (pickled / WEIGHTS_FILE).rename(pickled / "adapter_model.bin")
        store.upload(pickled, "builds/pickled")
        cache = folder / "adapters"
        command = Command(
            folder,
            *("s3://adapters/kept/first", "--builds", "s3://adapters/builds", "--base", base_directory()),
            *("--", "--dtype", "float32", "--max-model-len", "256", "--served-model-name", "base"),
            **store.environment,
            SOKA_ADAPTER_CACHE=str(cache),
        )
        try:
            command.wait_ready()
            server = Server(command.url, command.log)
            yield Remote(AdapterServer(server, references, folder), store, cache, command.output)
        finally:
            command.end()


def test_a_target_and_names_are_served_from_the_store(remote: Remote) -> None:
    remote.served.check_at_once(["first", "second", "base"])  # the second is fetched at its first request
    server = remote.served.server
    for name, said in {"nothing": "does not exist", "pickled": "a pickle, which is never fetched"}.items():
        status, answer = server.post("/v1/completions", {"model": name, "prompt": PROMPTS[0], "max_tokens": 1})
        assert status == (404 if name == "nothing" else 400), answer
        assert said in answer["error"]["message"]


def test_loads_over_http_come_from_below_the_url_only(remote: Remote) -> None:
    server = remote.served.server
    refused = {
        "s3://adapters/kept/first": "not below s3://adapters/builds",
        "s3://adapters/builds/../kept/first": "'.' or '..'",
        "s3://adapters/buildings/first": "not below",
        "https://127.0.0.1/adapters/builds/third": "not below",
        "https://user:hunter2@127.0.0.1/a": "credentials in a URL",
        f"file://{remote.served.folder}/first": "give the folder as a path",
        f"{remote.served.folder}/first": "not an adapter directory inside",
        "owner/name": "not an adapter directory inside",
    }
    for path, said in refused.items():
        status, answer = server.load("other", path)
        assert status == 400, (path, answer)
        assert said in answer["error"]["message"], path
    status, answer = server.load("loaded", "s3://adapters/builds/third")
    assert status == 200, answer
    remote.served.references["loaded"] = remote.served.references["third"]
    remote.served.check_alone("loaded", PROMPTS[0])


def test_what_the_cache_has_dropped_is_fetched_again(remote: Remote) -> None:
    server = remote.served.server
    remote.served.check_alone("second", PROMPTS[1])
    places = {card["id"]: card["root"] for card in server.get("/v1/models")["data"]}
    place = Path(places["second"])
    assert remote.cache in place.parents
    shutil.rmtree(place.parent)
    remote.served.check_alone("second", PROMPTS[1])
    assert (place / WEIGHTS_FILE).is_file()


def test_no_secret_is_shown(remote: Remote) -> None:
    shown = "\n".join(
        [
            *(file.read_text(errors="replace") for file in (remote.output, remote.served.server.log)),
            str(remote.served.server.get("/v1/models")),
            *(
                file.read_text(errors="replace")
                for file in remote.cache.rglob("*")
                if file.suffix in (".json", ".lock")
            ),
        ]
    )
    assert "first" in shown
    assert not [name for name in ("AWS_SECRET_ACCESS_KEY",) if remote.store.environment[name] in shown]
    assert "hunter2" not in shown
    assert remote.cache.stat().st_mode & 0o077 == 0
