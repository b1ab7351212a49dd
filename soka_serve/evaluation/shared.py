"""What runs the models of one evaluation, or of several that share it: a vLLM server, or the base in this process."""

from __future__ import annotations

import logging
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soka_serve.errors import SokaError, printable_lines
from soka_serve.evaluation.subject import Subject
from soka_serve.io.json_files import read_json
from soka_serve.serving.command import Launch, ServeOptions

if TYPE_CHECKING:
    from soka_serve.serving.process import Server

logger = logging.getLogger(__name__)

_START_S = 1800.0


def own_dtype(asked: str, model: Path) -> str:
    """The checkpoint's own dtype, which "auto" means with both backends. vLLM would take 16 bits for float32."""
    if asked != "auto":
        return asked
    config = read_json(model / "config.json")
    found = config.get("dtype") or config.get("torch_dtype")
    return found if found in ("float32", "bfloat16", "float16") else "auto"


class SharedServer:
    """One vLLM server for the adapters of several evaluations, which agree on all but the adapter.

    It is started when the first of them has something to ask, again for the next of them if it has died meanwhile, and
    ended with the block.

    Args:
        subjects: what they measure.
        options: for vLLM, as after `--` of `soka-serve serve`.
    """

    def __init__(self, subjects: Sequence[Subject], options: tuple[str, ...]) -> None:
        self._subjects = subjects
        self._options = options
        self._stack = ExitStack()
        self._running: tuple[Launch, Server] | None = None
        self._failed = False

    def __enter__(self) -> SharedServer:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def running(self) -> tuple[Launch, Server] | None:
        """The server; None where it could not be started, as when one adapter of them ends it."""
        if self._running is not None and not self._running[1].lives():
            logger.warning("the server of these evaluations has died; starting it again for the next of them")
            self._running = None
            self._stack.close()
        if self._running is None and not self._failed:
            given = [f"{subject.target.name}={subject.target.path}" for subject in self._subjects]
            first = self._subjects[0]
            try:
                self._running = self._stack.enter_context(started_vllm(first, given, first.base, self._options))
            except SokaError as error:
                self._failed = True
                logger.warning(
                    "one server for %s did not start, so each gets its own: %s",
                    *(", ".join(subject.target.name for subject in self._subjects), printable_lines(error.message)),
                )
        return self._running


@contextmanager
def started_vllm(
    subject: Subject, given: Sequence[str], model: Path, options: Sequence[str]
) -> Iterator[tuple[Launch, Server]]:
    """A server with the settings of a subject, on a free port.

    Args:
        subject: of whose manifest the settings are.
        given: '[NAME=]TARGET' each.
        model: whose dtype "auto" means.
        options: for vLLM; they win.
    """
    from soka_serve.serving.process import StopSignal, started
    from soka_serve.serving.serve import plan_launch

    serve, options = subject.manifest.serve, list(options)
    for option, value in (("--dtype", own_dtype(serve.dtype, model)), ("--max-model-len", serve.max_model_len)):
        if value is not None and option not in options:
            options += [option, str(value)]
    if model == subject.base != subject.tokenizer and "--tokenizer" not in options:
        options += ["--tokenizer", str(subject.tokenizer)]
    settings = ServeOptions(host="127.0.0.1", port=_free_port(), runtime_loading=False, vllm=tuple(options))
    base = None if subject.target.kind == "merged" else str(subject.base)
    _, launch = plan_launch(given, settings, base=base)
    log = Path(tempfile.mkdtemp(prefix="soka-eval-")) / "vllm.log"
    try:
        with started(launch, log, _START_S) as server, server.explaining():
            logger.info("vLLM answers after %.0f s", server.ready_s)
            yield launch, server
    except StopSignal as stopped:
        raise KeyboardInterrupt from stopped


class SharedModel:
    """The base of several evaluations in this process, loaded once; an adapter is on it while it is asked."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._base: Any = None
        self.adapted: Any = None

    def load(self, *key: Any) -> Any:
        """`load_base` of these arguments, in the place of any other."""
        from soka_serve.base.model import load_base

        if key != self._key:
            self._key, self._base = None, None  # not two at once
            self._base = load_base(*key)
            self._key = key
        return self._base

    def drop(self) -> None:
        """Forget the base: nobody knows what an adapter that could not be loaded has left on it."""
        self._key, self._base, self.adapted = None, None, None

    def give_back(self) -> None:
        """Take the adapter off the base again."""
        if self.adapted is not None:
            adapted, self.adapted = self.adapted, None
            self._base = adapted.unload()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
