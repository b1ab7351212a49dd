"""vLLM's list of models with adapters that are kept elsewhere; the engine is a stand-in that reads what it is told."""

from __future__ import annotations

import asyncio
import shutil
import warnings
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException

with warnings.catch_warnings():  # vLLM uses what torch has deprecated
    warnings.simplefilter("ignore")
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
    from vllm.exceptions import VLLMNotFoundError

    from soka_vllm import endpoints, remote

from soka_serve.adapter.remote import fetch as fetch_module
from soka_serve.adapter.remote.address import parse_folder
from soka_serve.adapter.remote.problems import FetchError
from soka_serve.io.file_names import WEIGHTS_FILE
from soka_vllm.hooks import modules
from soka_vllm.places import adapter_files
from soka_vllm.resolver import limits_of, operator_load
from tests.support.remote_stores import WebServer, send, web_server

STORED = Path(__file__).parents[2] / "data" / "stored" / "out" / "stored" / "adapter"


class Engine:
    """Reads the files of an adapter as the engine does, within the folders that a load is limited to."""

    model_config = SimpleNamespace(model="base", max_model_len=16)
    renderer = input_processor = None
    errored = False

    def __init__(self) -> None:
        self.read: list[bytes] = []

    async def add_lora(self, lora_request: Any) -> bool:
        with adapter_files(limits_of(lora_request)) as files:
            self.read.append((files / WEIGHTS_FILE).read_bytes())
        return True


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setenv("SOKA_ADAPTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SOKA_ADAPTER_ROOTS", "")  # as `serve --builds URL` sets it
    monkeypatch.setattr(fetch_module, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(remote, "_fetched", {})
    with web_server() as site:
        for path in ("builds/math/adapter", "builds/code", "kept/other"):
            site.upload(STORED, path)
        yield site


@pytest.fixture
def models(web: WebServer) -> Any:
    made = OpenAIServingModels(Engine(), [BaseModelPath("tiny", "tiny")])
    made.lora_resolvers = [remote.RemoteResolver(parse_folder(f"{web.url}/builds"))]
    return made


def resolve(models: Any, name: str) -> Any:
    return asyncio.run(endpoints.resolve(OpenAIServingModels.resolve_lora, models, name))


STOCK_RESOLVE = OpenAIServingModels.resolve_lora


async def resolve_hooked(models: Any, name: str) -> Any:
    return await endpoints.resolve(STOCK_RESOLVE, models, name)


def load(models: Any, name: str, path: str) -> Any:
    request = LoadLoRAAdapterRequest(lora_name=name, lora_path=path)
    return asyncio.run(endpoints.load(OpenAIServingModels.load_lora_adapter, models, request))


def refused(answer: Any, code: int) -> str:
    assert isinstance(answer, ErrorResponse), answer
    assert answer.error.code == code, answer
    return answer.error.message


def test_a_name_is_fetched_at_its_first_request(models: Any, web: WebServer, tmp_path: Path) -> None:
    for name in ("math", "code"):
        found = resolve(models, name)
        assert found.lora_name == name
        assert tmp_path / "cache" in Path(found.lora_path).parents
    assert models.engine_client.read == [(STORED / WEIGHTS_FILE).read_bytes()] * 2
    assert sorted(models.lora_requests) == ["code", "math"]


def test_what_is_not_there_or_not_to_be_had(models: Any, web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(web, "answer", lambda request: asked.append(request.path))
    assert "does not exist" in refused(resolve(models, "none"), 404)
    times = len(asked)
    assert times > 0
    refused(resolve(models, "none"), 404)
    assert len(asked) == times  # not again within seconds
    for name in ("..", "kept/other", ".hidden", "a/../../kept/other", "%2e%2e", "x" * 201):
        refused(resolve(models, name), 404)
    assert len(asked) == times
    web.files[f"/builds/code/{WEIGHTS_FILE}"] = b"0123456789"
    assert "not a safetensors file" in refused(resolve(models, "code"), 400)
    fetched = len(asked)
    assert "not a safetensors file" in refused(resolve(models, "code"), 400)
    assert len(asked) == fetched  # a damaged one is not fetched again at once either
    monkeypatch.setattr(web, "answer", lambda request: send(request, 403, b"") is None)
    assert "access denied" in refused(resolve(models, "math"), 503)
    monkeypatch.setattr(web, "answer", lambda request: send(request, 503, b"") is None)
    assert "cannot be reached" in refused(resolve(models, "math"), 503)
    assert models.lora_requests == {}


def test_clients_load_what_is_below_the_url_and_nothing_else(models: Any, web: WebServer) -> None:
    for path, said in {
        f"{web.url}/kept/other": "is not below",
        f"{web.url}/builds/../kept/other": "'.' or '..'",
        f"{web.url}/builds": "is not below",
        f"{web.url}/buildsmore/other": "is not below",
        "s3://bucket/other": "is not below",
        "https://me:hunter2@host/a": "credentials in a URL",
        f"file://{STORED}": "give the folder as a path",
        str(STORED): "not an adapter directory inside",
        "owner/name": "not an adapter directory inside",
    }.items():
        message = refused(load(models, "a", path), 400)
        assert said in message, path
        assert "hunter2" not in message
    assert not web.asked
    assert "added" in load(models, "a", f"{web.url}/builds/math")
    with operator_load():
        assert "added" in load(models, "b", f"{web.url}/kept/other")
    models.lora_resolvers = []
    assert "no URL is allowed" in refused(load(models, "c", f"{web.url}/builds/math"), 400)


def test_what_the_cache_has_dropped_is_fetched_again(models: Any, web: WebServer) -> None:
    path = Path(resolve(models, "math").lora_path)
    shutil.rmtree(path.parent)

    async def checked(serving: Any, request: Any) -> None:
        assert (path / WEIGHTS_FILE).is_file()

    def ask() -> None:
        serving = SimpleNamespace(models=models)
        asyncio.run(endpoints.check_model(checked, serving, SimpleNamespace(model="math")))

    ask()
    asked = len(web.asked)
    ask()
    assert len(web.asked) == asked
    asyncio.run(
        endpoints.unload(OpenAIServingModels.unload_lora_adapter, models, UnloadLoRAAdapterRequest(lora_name="math"))
    )
    assert remote._fetched == {}


def test_a_store_that_is_down_is_asked_once_for_what_the_cache_has_dropped(
    models: Any, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(resolve(models, "math").lora_path)
    fetches: list[object] = []

    async def down(address: object) -> Path:
        fetches.append(address)
        await asyncio.sleep(0.05)
        raise FetchError("no answer", kind="passing")

    async def together() -> None:
        await asyncio.gather(*(remote.keep(str(path)) for _ in range(20)))

    def denied(_: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(remote, "fetch", down)
    with monkeypatch.context() as patch:
        patch.setattr(remote, "touch", denied)  # a cache that others write
        asyncio.run(together())
    assert not fetches
    shutil.rmtree(path.parent)
    asyncio.run(together())
    asyncio.run(together())  # at once: it is not asked again
    assert len(fetches) == 1
    monkeypatch.setattr(remote, "_FAILED_S", 0.0)
    remote._not_kept.clear()
    asyncio.run(together())
    asyncio.run(together())
    assert len(fetches) == 3
    assert not remote._keeping


def test_a_request_does_not_wait_for_a_store_that_hangs(
    models: Any, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(resolve(models, "math").lora_path)
    shutil.rmtree(path.parent)
    now, fetches, hangs = [1000.0], [0], asyncio.Event()

    async def down(address: object) -> Path:
        fetches[0] += 1
        await hangs.wait()
        raise FetchError("no answer", kind="passing")

    async def ask_twice() -> None:
        await remote.keep(str(path))
        await remote.keep(str(path))
        assert fetches == [1]  # which still runs
        hangs.set()
        await asyncio.gather(*remote._keeping.values())

    monkeypatch.setattr(remote, "fetch", down)
    monkeypatch.setattr(remote, "_WAIT_S", 0.01, raising=False)
    monkeypatch.setattr(remote, "_not_kept", {})
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: now[0]))
    asyncio.run(asyncio.wait_for(ask_twice(), 10))
    pauses = []
    for _ in range(8):
        count, begun = fetches[0], now[0]
        while fetches[0] == count:
            now[0] += 2.5
            asyncio.run(remote.keep(str(path)))
        pauses.append(now[0] - begun)
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300]


def test_a_reload_from_elsewhere_forgets_where_the_adapter_came_from(models: Any, web: WebServer) -> None:
    load(models, "a", f"{web.url}/builds/math")
    load(models, "b", f"{web.url}/builds/math")
    for name, left in (("a", 2), ("b", 1)):
        request = LoadLoRAAdapterRequest(lora_name=name, lora_path=f"{web.url}/builds/code", load_inplace=True)
        answer = asyncio.run(endpoints.load(OpenAIServingModels.load_lora_adapter, models, request))
        assert not isinstance(answer, ErrorResponse)
        assert len(remote._fetched) == left


def test_nothing_is_kept_of_an_adapter_that_is_refused(
    models: Any, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refusing(engine: Engine, lora_request: Any) -> bool:
        raise ValueError("it does not fit")

    monkeypatch.setattr(Engine, "add_lora", refusing)
    assert "it does not fit" in refused(load(models, "a", f"{web.url}/builds/math"), 400)
    assert remote._fetched == {}
    assert isinstance(resolve(models, "math"), ErrorResponse)
    assert remote._fetched == {}


def asked(models: Any, name: str) -> Any:
    """What vLLM's check of a request's model answers."""
    serving = SimpleNamespace(models=models, request_logger=None, _is_model_supported=models.is_base_model)
    serving.create_error_response = BaseServing.create_error_response
    check = BaseServing._check_model
    return asyncio.run(endpoints.check_model(check, serving, SimpleNamespace(model=name)))


def test_a_request_is_told_that_the_store_does_not_answer(
    models: Any, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setattr(type(models), "resolve_lora", partialmethod(resolve_hooked))
    assert asked(models, "code") is None
    monkeypatch.setattr(web, "answer", lambda request: send(request, 503, b"") is None)
    for name in ("math", "code+0.5*math"):
        assert "math: " in refused(asked(models, name), 503)
    monkeypatch.setattr(web, "answer", lambda request: None)
    assert "does not exist" in refused(asked(models, "none"), 404)
    assert "no adapter `none`" in refused(asked(models, "code+none"), 404)


def test_servers_of_pooling_models_check_names_alike(
    models: Any, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "vllm.entrypoints.pooling.base.serving" in modules("0.32.0")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setattr(type(models), "resolve_lora", partialmethod(resolve_hooked))

    async def add_lora(lora_request: Any) -> bool:
        return True

    monkeypatch.setattr(models.engine_client, "add_lora", add_lora)
    serving = SimpleNamespace(models=models, _is_model_supported=models.is_base_model)
    check = PoolingBaseServing._check_model

    def ask(name: str) -> None:
        asyncio.run(endpoints.check_pooling_model(check, serving, SimpleNamespace(model=name)))

    for name in ("tiny", "code", "code+0.5*math"):
        ask(name)
    assert models.lora_requests.keys() == {"code", "math"}
    folder = Path(models.lora_requests["math"].lora_path)
    shutil.rmtree(folder.parent)
    ask("math")
    assert (folder / WEIGHTS_FILE).is_file()
    with pytest.raises(VLLMNotFoundError, match="code"):
        ask("none")
    monkeypatch.setattr(web, "answer", lambda request: send(request, 503, b"") is None)
    with pytest.raises(HTTPException, match="503: other: "):
        ask("other")


def test_the_adapters_of_a_sum_are_fetched_again(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setattr(type(models), "resolve_lora", partialmethod(resolve_hooked))

    async def add_lora(lora_request: Any) -> bool:
        return True

    monkeypatch.setattr(models.engine_client, "add_lora", add_lora)
    assert asked(models, "code+0.5*math") is None
    paths = [Path(one.lora_path) for one in models.lora_requests.values()]
    assert len(paths) == 2
    for path in paths:
        shutil.rmtree(path.parent)
    assert asked(models, "code+0.5*math") is None
    assert all((path / WEIGHTS_FILE).is_file() for path in paths)


def test_an_adapter_of_the_hubs_own_cache_is_read(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    blobs = snapshot.parents[1] / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for number, file in enumerate(STORED.iterdir()):
        shutil.copy(file, blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr(remote, "fetch_adapter", lambda address: snapshot)
    assert resolve(models, "name").lora_path == str(snapshot)
    monkeypatch.delenv("SOKA_ADAPTER_ROOTS")
    assert "added" in load(models, "other", "owner/name")
