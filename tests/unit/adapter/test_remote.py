"""Adapters that are kept elsewhere: addresses, stores that fail or lie, and the cache."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import fsspec
import pytest

from soka_serve.adapter.remote import cache as cache_module
from soka_serve.adapter.remote import fetch as fetch_module
from soka_serve.adapter.remote.address import Address, parse_address, parse_folder
from soka_serve.adapter.remote.cache import FOLDER_VARIABLE, LIMIT_VARIABLE, AdapterCache, hold
from soka_serve.adapter.remote.fetch import fetch_adapter, local_adapter
from soka_serve.adapter.remote.problems import FetchError
from soka_serve.errors import CheckpointError, SokaError
from soka_serve.io.file_names import CONFIG_FILE, LOCK_FILE, WEIGHTS_FILE
from tests.support.remote_stores import Hub, S3Server, WebServer, hub, s3_server, send, web_server

STORED = Path(__file__).parents[2] / "data" / "stored" / "out" / "stored" / "adapter"
KIB = 1024


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(fetch_module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(cache_module, "_held", {})


@pytest.fixture
def web() -> Iterator[WebServer]:
    with web_server() as site:
        yield site


@pytest.fixture
def a_hub() -> Iterator[Hub]:
    with hub(Path(os.environ[FOLDER_VARIABLE]) / "none") as made:
        yield made


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield s3
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def fetched(text: str) -> Path:
    address = parse_address(text)
    assert address is not None
    return fetch_adapter(address)


def cached() -> list[str]:
    """Names in the cache's folder that are not locks."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    return sorted(path.name for path in folder.iterdir() if path.name not in (".lock", ".locks"))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The same adapter with other weights, and a lock that says so."""
    folder = tmp_path / "other"
    shutil.copytree(STORED, folder)
    change(folder)
    return folder


def change(folder: Path) -> None:
    file = folder / WEIGHTS_FILE
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    lock = (folder / LOCK_FILE).read_text()
    assert before in lock
    (folder / LOCK_FILE).write_text(lock.replace(before, hashlib.sha256(content).hexdigest()))


# --- addresses ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", Address("hf", "owner/name")),
        ("owner/name@refs/pr/1", Address("hf", "owner/name", "refs/pr/1")),
        ("hf://owner/name@v1", Address("hf", "owner/name", "v1")),
        ("s3://b/a/", Address("s3", "s3://b/a")),
        ("s3://b/a=1/c@sha256:" + "0" * 64, Address("s3", "s3://b/a=1/c", None, "0" * 64)),
        ("owner/name@v1@sha256:" + "a" * 64, Address("hf", "owner/name", "v1", "a" * 64)),
        ("file:///a/b", None),
        ("build", None),
        ("./owner/name", None),
        ("/owner/name", None),
        ("a/b/c", None),
    ],
)
def test_addresses_are_told_from_paths(text: str, expected: Address | None) -> None:
    assert parse_address(text) == expected


def test_what_is_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build" / "math").mkdir(parents=True)
    assert parse_address("build/math") is None
    assert parse_address("build/mth") is None  # mistyped, and no hub's business
    assert parse_address("build/mth@v1") is not None
    assert local_adapter("file:///a%20b/c") == Path("/a b/c")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s3://b/../c", "'.' or '..'"),
        ("s3://b/a/%2e%2E/c", "'.' or '..'"),
        ("s3://b//c", "empty parts"),
        ("https://h/a%2f..%2fb", "empty parts"),
        ("https://h/a\\..\\b", "backslashes"),
        ("https://h/a\nb", "control characters"),
        ("https://user:hunter2@h/a", "credentials"),
        ("https://h/a?X-Amz-Signature=hunter2", "query"),
        ("https://h/a#hunter2", "fragment"),
        ("simplecache::s3://b/a", "chain"),
        ("zip://a.zip::https://h/a", "chain"),
        ("s3://", "empty parts"),
        ("file://host/a", "file:///"),
        ("hf://owner", "hf://owner/name"),
        ("hf://datasets/owner/name", "hf://owner/name"),
        ("owner/name@sha256:12", "64 hexadecimal digits"),
    ],
)
def test_what_is_no_address_is_refused_and_no_secret_shown(text: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as raised:
        parse_address(text)
    assert "hunter2" not in raised.value.message + str(raised.value.hint)


def test_folders_of_adapters() -> None:
    assert parse_folder("s3://b/a/").below("math").location == "s3://b/a/math"
    assert parse_folder("hf://owner").below("math") == Address("hf", "owner/math")
    for text in ("file:///a", "hf://owner/name", "s3://b/a@sha256:" + "0" * 64):
        with pytest.raises(CheckpointError, match=r"folder that holds adapters|hf://owner"):
            parse_folder(text)


# --- stores ---


def test_a_folder_of_s3(bucket: S3Server, other: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = bucket.upload(STORED, "builds/math/adapter")
    first = fetched("s3://adapters/builds/math")  # the build: its adapter is taken
    assert contents(first) == contents(STORED)
    assert first.name == "math"
    assert fetched(url) != first  # another address
    assert fetched("s3://adapters/builds/math") == first
    bucket.upload(other, "builds/math/adapter")
    second = fetched("s3://adapters/builds/math")
    assert contents(second) == contents(other)
    assert contents(first) == contents(STORED)  # still there for whoever reads it
    caplog.set_level("DEBUG", logger="soka_serve")
    assert bucket.environment["AWS_SECRET_ACCESS_KEY"] not in caplog.text


def test_what_s3_refuses_is_told_with_what_to_do(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FetchError, match=r"s3://no-such-bucket/a: no adapter_config\.json") as raised:
        fetched("s3://no-such-bucket/a")
    assert raised.value.kind == "missing"
    with pytest.raises(FetchError, match=r"s3://adapters/nothing: no adapter_config\.json"):
        fetched("s3://adapters/nothing")
    bucket.put("half/adapter_config.json", b"{}")
    with pytest.raises(FetchError, match=r"adapter_config\.json is there, adapter_model\.safetensors is not"):
        fetched("s3://adapters/half")
    bucket.put("half/adapter_model.bin", b"\x80")
    with pytest.raises(FetchError, match="a pickle, which is never fetched"):
        fetched("s3://adapters/half")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(FetchError, match="no credentials") as raised:
        fetched("s3://adapters/half")
    assert "AWS_ACCESS_KEY_ID" in str(raised.value.hint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(fetch_module, "TRIES", 1)  # s3fs tries several times, too
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(FetchError, match="cannot be reached"):
        fetched("s3://adapters/half")
    assert cached() == []


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(FetchError, match="not installed") as raised:
        fetched("gs://b/a")
    assert "pip install -e '.[gcs]'" in str(raised.value.hint)
    with pytest.raises(FetchError, match="nonsense"):
        fetched("nonsense://b/a")


def test_hub_ids_with_revisions(a_hub: Hub, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = a_hub.push("owner/math", STORED, "v1")
    a_hub.push("owner/math", other)
    old = fetched("owner/math@v1")
    assert contents(old) == contents(STORED)
    assert contents(fetched("owner/math")) == contents(other)
    a_hub.site.asked.clear()
    assert contents(fetched(f"owner/math@{first}")) == contents(STORED)
    a_hub.site.asked.clear()
    fetched(f"owner/math@{first}")
    assert a_hub.site.asked == []  # a commit cannot change
    with pytest.raises(FetchError, match="owner/math@v9: not found") as raised:
        fetched("owner/math@v9")
    assert "revision" in str(raised.value.hint)
    with pytest.raises(FetchError, match="owner/none: not found"):
        fetched("owner/none")


def test_a_hub_that_wants_a_token(
    a_hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a_hub.push("owner/private", STORED)
    a_hub.token = "hf_hunter2"
    with pytest.raises(FetchError, match="owner/private") as raised:
        fetched("owner/private")
    assert "HF_TOKEN" in str(raised.value.hint)
    monkeypatch.setenv("HF_TOKEN", "hf_hunter2")
    caplog.set_level("DEBUG", logger="soka_serve")
    assert contents(fetched("owner/private")) == contents(STORED)
    assert "hunter2" not in caplog.text


def test_what_a_hub_sends_is_held_against_its_hashes(a_hub: Hub, other: Path) -> None:
    commit = a_hub.push("owner/math", STORED)
    answer = a_hub.answer

    def lie(request: BaseHTTPRequestHandler) -> bool:
        if request.path.endswith(f"resolve/{commit}/{WEIGHTS_FILE}"):
            send(request, 200, (other / WEIGHTS_FILE).read_bytes())
            return True
        return answer(request)

    a_hub.site.answer = lie
    with pytest.raises(FetchError, match=r"adapter_model\.safetensors: its sha256 hash is not"):
        fetched("owner/math")
    assert cached() == []


def test_a_hub_that_is_switched_off(a_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_hub.push("owner/math", STORED)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="cannot be reached") as raised:
        fetched("owner/math")
    assert "HF_HUB_OFFLINE" in str(raised.value.hint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    from huggingface_hub import snapshot_download

    snapshot_download("owner/math", cache_dir=tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert contents(local_adapter("owner/math")) == contents(STORED)


def test_a_web_server_and_memory(web: WebServer) -> None:
    assert contents(fetched(web.upload(STORED, "a/math"))) == contents(STORED)
    assert web.fetched(WEIGHTS_FILE) == 1
    fetched(f"{web.url}/a/math")
    assert web.fetched(WEIGHTS_FILE) == 1  # its ETag says that nothing has changed
    memory = fsspec.filesystem("memory")
    for name, content in contents(STORED).items():
        memory.pipe(f"/a/{name}", content)
    assert contents(fetched("memory://a")) == contents(STORED)


def test_a_server_without_versions_is_asked_each_time(web: WebServer, other: Path) -> None:
    def bare(request: BaseHTTPRequestHandler) -> bool:
        if request.path not in web.files:
            return False
        send(request, 200, web.files[request.path])
        return True

    web.answer = bare
    url = web.upload(STORED, "a")
    assert fetched(url) == fetched(url)
    assert web.fetched(WEIGHTS_FILE) == 2
    web.upload(other, "a")
    assert contents(fetched(url)) == contents(other)


# --- stores that fail and lie ---


def test_a_passing_failure_is_tried_again_and_a_lasting_one_not_for_ever(web: WebServer) -> None:
    failures = 2

    def fail(request: BaseHTTPRequestHandler) -> bool:
        nonlocal failures
        if request.command == "GET" and request.path.endswith(WEIGHTS_FILE) and failures:
            failures -= 1
            if failures:
                send(request, 503, b"busy")
            else:  # half of it
                content = web.files[request.path]
                request.send_response(200)
                request.send_header("Content-Length", str(len(content)))
                request.end_headers()
                request.wfile.write(content[: len(content) // 2])
            return True
        return False

    web.answer = fail
    url = web.upload(STORED, "a")
    assert contents(fetched(url)) == contents(STORED)
    failures = 10**9
    web.answer = lambda request: request.command == "GET" and send(request, 503, b"") is None
    web.asked.clear()
    with pytest.raises(FetchError, match="cannot be reached"):
        fetched(f"{url}@sha256:{'0' * 64}")
    assert web.fetched(CONFIG_FILE) == fetch_module.TRIES


def refuses(web: WebServer, url: str, said: str) -> FetchError:
    with pytest.raises(FetchError, match=said) as raised:
        fetched(url)
    assert cached() == []
    return raised.value


def test_a_redirect_leads_to_no_file(web: WebServer, tmp_path: Path) -> None:
    def lead(request: BaseHTTPRequestHandler) -> bool:
        send(request, 302, b"", Location=f"file://{STORED}/{Path(request.path).name}")
        return True

    web.answer = lead
    error = refuses(web, f"{web.url}/a", "cannot be read")
    assert "Redirect" in error.message


def test_signatures_and_passwords_of_web_servers_are_not_shown(
    web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def guarded(request: BaseHTTPRequestHandler) -> bool:
        if "Basic" in request.headers.get("Authorization", ""):
            return False
        if "signature" in request.path:
            send(request, 403, b"")
        else:
            send(request, 302, b"", Location=f"{request.path}?signature=hunter2")
        return True

    web.answer = guarded
    url = web.upload(STORED, "a")
    error = refuses(web, url, "access denied")
    assert "hunter2" not in error.message
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    caplog.set_level("DEBUG", logger="soka_serve")
    assert contents(fetched(url)) == contents(STORED)
    assert "hunter2" not in caplog.text


def test_bodies_that_are_longer_than_they_said(web: WebServer) -> None:
    sent = 0

    def endless(request: BaseHTTPRequestHandler) -> bool:
        nonlocal sent
        if request.command == "HEAD" or not request.path.endswith((WEIGHTS_FILE, "README.md")):
            return False
        request.send_response(200)
        request.end_headers()  # no length: until the connection ends
        try:
            while sent < 1 << 30:
                request.wfile.write(b"0" * 65536)
                sent += 65536
        except OSError:
            pass
        return True

    web.answer = endless
    refuses(web, web.upload(STORED, "a"), "more than the 2456 bytes came")
    assert sent < 64 << 20


def test_a_size_that_is_too_large_or_not_said(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def claim(request: BaseHTTPRequestHandler) -> bool:
        if not request.path.endswith(WEIGHTS_FILE):
            return False
        request.send_response(200)
        if size:
            request.send_header("Content-Length", str(size))
        request.end_headers()
        request.close_connection = True
        return True

    web.answer = claim
    url = web.upload(STORED, "a")
    size = 1 << 45
    error = refuses(web, url, r"adapter_model\.safetensors has .*; at most 10.* are fetched")
    assert LIMIT_VARIABLE in str(error.hint)
    size = 0
    refuses(web, url, "the size of adapter_model.safetensors is not said")
    web.files["/a/soka.lock"] = b"#" * (9 << 20)
    web.answer = lambda request: False
    refuses(web, url, "soka.lock has .*; at most 8")


def test_files_that_do_not_belong_together(web: WebServer, other: Path) -> None:
    url = web.upload(STORED, "a")
    digest = hashlib.sha256((STORED / WEIGHTS_FILE).read_bytes()).hexdigest()
    web.files[f"/a/{WEIGHTS_FILE}"] = (other / WEIGHTS_FILE).read_bytes()
    refuses(web, url, f"its soka.lock says {digest}")
    web.upload(other, "a")
    refuses(web, f"{url}@sha256:{digest}", f"{WEIGHTS_FILE} has sha256")
    web.files[f"/a/{WEIGHTS_FILE}"] = b"\x80\x04pickles"
    error = refuses(web, url, f"{web.url}/a/{WEIGHTS_FILE}: not a safetensors file")
    assert str(Path(os.environ[FOLDER_VARIABLE])) not in error.message
    web.upload(STORED, "a")
    assert contents(fetched(f"{url}@sha256:{digest}")) == contents(STORED)


def test_an_adapter_that_changes_while_it_is_fetched_comes_in_one_version(web: WebServer, other: Path) -> None:
    url = web.upload(STORED, "a")

    def swap(request: BaseHTTPRequestHandler) -> bool:
        if request.command == "GET" and request.path.endswith(WEIGHTS_FILE):
            web.answer = lambda request: False
            web.upload(other, "a")
        return False

    web.answer = swap
    assert contents(fetched(url)) == contents(other)


def test_only_the_files_of_an_adapter_are_fetched(web: WebServer) -> None:
    url = web.upload(STORED, "a")
    web.files["/a/training_args.bin"] = web.files["/a/adapter_model.bin"] = b"\x80"
    assert set(contents(fetched(url))) == {CONFIG_FILE, WEIGHTS_FILE, LOCK_FILE, "README.md"}
    assert not any("bin" in line for line in web.asked)


# --- the cache ---


def weigh(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_the_least_recently_used_go(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    each = weigh(STORED)
    monkeypatch.setenv(LIMIT_VARIABLE, str(3.5 * each / 2**30))
    monkeypatch.setattr(cache_module, "GRACE_S", 0.0)
    places = [fetched(web.upload(STORED, f"a{i}")) for i in range(3)]
    for age, place in enumerate(places):
        os.utime(place.parent, (time.time() - 100 - age,) * 2)  # a2 is the oldest
    assert fetched(f"{web.url}/a2") == places[2]
    fourth = fetched(web.upload(STORED, "a3"))
    assert [place.exists() for place in (*places, fourth)] == [True, False, True, True]
    assert AdapterCache.from_environment().total() <= 3.5 * each
    assert contents(fetched(f"{web.url}/a1")) == contents(STORED)
    monkeypatch.setenv(LIMIT_VARIABLE, str(0.5 * each / 2**30))
    with pytest.raises(FetchError, match="/a4: it takes"):
        fetched(web.upload(STORED, "a4"))


def test_what_is_in_use_stays(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    each = weigh(STORED)
    monkeypatch.setenv(LIMIT_VARIABLE, str(1.5 * each / 2**30))
    first = fetched(web.upload(STORED, "a0"))
    with pytest.raises(FetchError, match=r"/a1: it takes .* in use") as raised:
        fetched(web.upload(STORED, "a1"))  # used a moment ago
    assert LIMIT_VARIABLE in str(raised.value.hint)
    monkeypatch.setattr(cache_module, "GRACE_S", 0.0)
    assert hold(first)
    with pytest.raises(FetchError, match="in use"):
        fetched(f"{web.url}/a1")
    os.close(cache_module._held.popitem()[1])
    assert contents(fetched(f"{web.url}/a1")) == contents(STORED)
    assert not first.exists()
    assert not hold(first)


def test_damaged_entries_and_links_are_not_used(web: WebServer, tmp_path: Path) -> None:
    url = web.upload(STORED, "a")
    place = fetched(url)
    file = place / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-4])
    assert contents(fetched(url)) == contents(STORED)
    outside = tmp_path / "outside"
    shutil.copytree(STORED, outside / "a")
    entry = place.parent
    shutil.rmtree(entry)
    entry.symlink_to(outside)
    again = fetched(url)
    assert not entry.is_symlink()
    assert contents(again) == contents(STORED)
    assert (outside / "a").is_dir()  # a link is removed, not what it leads to
    file = again / WEIGHTS_FILE
    file.unlink()
    file.symlink_to(outside / "a" / WEIGHTS_FILE)
    assert not (fetched(url) / WEIGHTS_FILE).is_symlink()
    assert (again.stat().st_mode | again.parent.stat().st_mode) & 0o077 == 0


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, web: WebServer) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(SokaError, match="other users may write"):
        fetched(web.upload(STORED, "a"))


@pytest.mark.parametrize("text", ["0", "-1", "many", "inf", "nan"])
def test_a_limit_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, text)
    with pytest.raises(SokaError, match="expected a number of GiB above 0"):
        AdapterCache.from_environment()


def _fetch_in_a_process(url: str) -> dict[str, bytes]:
    return contents(fetched(url))


def test_several_processes_and_threads_fetch_it_once(web: WebServer) -> None:
    urls = [web.upload(STORED, f"a{i}") for i in range(2)]
    started = threading.Event()

    def slow(request: BaseHTTPRequestHandler) -> bool:
        started.set()
        if request.command == "GET":
            time.sleep(0.2)
        return False

    web.answer = slow
    with multiprocessing.get_context("spawn").Pool(2) as pool, ThreadPoolExecutor(4) as threads:
        others = pool.map_async(_fetch_in_a_process, urls * 2)
        own = list(threads.map(_fetch_in_a_process, urls * 2))
        assert all(found == contents(STORED) for found in [*own, *others.get(60)])
    assert web.fetched(WEIGHTS_FILE) == 2
    assert len(cached()) == 2


def test_what_a_killed_download_left_is_removed(web: WebServer, tmp_path: Path) -> None:
    url = web.upload(STORED, "a")
    fetched(url)
    left = tmp_path / "cache" / f".fetch.tmp-1-{'0' * 12}-abcdef"
    from soka_serve.io.leftovers import machine_token

    left = left.with_name(f".fetch.tmp-1-{machine_token()}-abcdef")
    left.mkdir()
    (left / WEIGHTS_FILE).write_bytes(b"0" * KIB)
    assert fetched(url)  # a hit changes nothing
    assert left.exists()
    fetched(web.upload(STORED, "b"))
    assert not left.exists()


def test_local_adapters_stay_where_they_are(tmp_path: Path) -> None:
    assert local_adapter(tmp_path) == tmp_path
    assert local_adapter(str(STORED)) == STORED
    assert json.loads((local_adapter(f"file://{STORED}") / CONFIG_FILE).read_text())
