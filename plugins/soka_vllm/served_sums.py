"""The sums of adapters that an API process knows: made when they are asked for, found again however they are written.

A sum is kept under one name, with the path that says what it is made of. The path is made anew for every request, so a
member that was loaded again or unloaded meanwhile makes another sum, or none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from vllm import envs
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.lora.request import LoRARequest

from soka_serve.errors import printable
from soka_serve.io.names import is_model_name
from soka_vllm import metrics, remote
from soka_vllm.resolver import reasons_noted
from soka_vllm.settings import sums_limit
from soka_vllm.sum_names import SumError, Term, may_be_sum, parse_sum, sum_terms
from soka_vllm.sums import is_sum, request_of

# The model's name and the sum of the request at hand: others may push it out of the table while that is prepared.
_asked: ContextVar[tuple[str, Any] | None] = ContextVar("soka_asked_sum", default=None)


class MissingError(Exception):
    """Parts of a sum that are no adapters, "" for a part without a name."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(*names)
        self.names = list(names)


class ServedSums:
    """The sums of one OpenAIServingModels.

    Args:
        models: vLLM's.
        limit: how many are kept; 0: none are served.
    """

    def __init__(self, models: Any, limit: int) -> None:
        self._models = models
        self._limit = limit
        self._requests: OrderedDict[str, Any] = OrderedDict()
        self._loads: dict[str, int] = {}

    def reloaded(self, name: str) -> None:
        """Note that an adapter was loaded again in place."""
        self._loads[name] = self._loads.get(name, 0) + 1

    def unloaded(self, name: str) -> None:
        """Note that an adapter was unloaded; it gets another number when it comes back."""
        self._loads.pop(name, None)

    def find(self, text: str) -> Any:
        """The request of a sum that is served now, or None."""
        if not self._limit or not may_be_sum(text) or text in self._models.lora_requests:
            return None
        asked = _asked.get()
        if asked is not None and asked[0] == text:
            return asked[1]
        try:
            terms = sum_terms(parse_sum(text, self._models.lora_requests))
        except SumError:
            return None
        if any(term.name not in self._models.lora_requests for term in terms):
            return None
        return self._current(request_of(terms, self._models.lora_requests, self._loads))

    async def ask(self, text: str) -> Any:
        """The request of a sum, which is made if need be; None where the text is none, or sums are not served.

        An ErrorResponse (400) of what is wrong with a sum whose names are right, or with one of its adapters; 503 where
        that cannot be fetched.

        Raises:
            MissingError: parts that are no adapters.
        """
        if not self._limit or not may_be_sum(text) or text in self._models.lora_requests:
            return None
        try:
            terms = parse_sum(text, self._models.lora_requests)
            refused = await self._find_members(terms)
            if refused is not None:
                return refused
            wanted = request_of(sum_terms(terms), self._models.lora_requests, self._loads)
        except SumError as error:
            return create_error_response(str(error))
        except KeyError as error:  # unloaded while others were loaded
            raise MissingError(error.args) from error
        answer = await self._serve(wanted)
        if isinstance(answer, LoRARequest):
            _asked.set((text, answer))
        return answer

    async def _find_members(self, terms: Sequence[Term]) -> ErrorResponse | None:
        """Load the members by their names where that is how they come; the answer if one cannot be."""
        models, missing = self._models, []
        for name in dict.fromkeys(term.name for term in terms):
            if models.is_base_model(name):
                raise SumError(f"`{printable(name)}` is the base, which is in every sum; leave it out")
            if name in models.lora_requests:
                await remote.keep(models.lora_requests[name].lora_path)
                continue
            found = None
            if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING and is_model_name(name):
                found = await models.resolve_lora(name)
            if isinstance(found, ErrorResponse) and found.error.code != HTTPStatus.NOT_FOUND:
                return found
            if not isinstance(found, LoRARequest):
                missing.append(name)
        if missing:
            raise MissingError(missing)
        return None

    def _current(self, wanted: Any) -> Any:
        """A sum from the table, if it is still of the same adapters."""
        if not is_sum(wanted.lora_path):
            return wanted  # an adapter itself
        found = self._requests.get(wanted.lora_name)
        if found is None or found.lora_path != wanted.lora_path:
            return None
        self._requests.move_to_end(wanted.lora_name)
        return found

    async def _serve(self, wanted: Any) -> Any:
        name = wanted.lora_name
        async with self._models.lora_resolver_lock[wanted.lora_path]:
            found = self._current(wanted)
            if found is not None:
                return found
            try:
                with reasons_noted() as reasons:
                    await self._models.engine_client.add_lora(wanted)
            except Exception as error:
                if self._models.engine_client.errored:
                    raise
                said = "\n".join(dict.fromkeys(reasons or [str(error)]))
                return create_error_response(f"The sum `{printable(name)}` cannot be served: {said}")
            self._requests[name] = wanted
            self._requests.move_to_end(name)
            while len(self._requests) > self._limit:
                metrics.counters().unloaded(self._requests.popitem(last=False)[0])
            return wanted


def begin_request() -> None:
    """Forget what an earlier request in the same context asked for."""
    _asked.set(None)


def sums_of(models: Any) -> ServedSums:
    """Those of vLLM's list of models, made at the first call."""
    if "_soka_sums" not in models.__dict__:
        # One that only renders has no engine.
        models._soka_sums = ServedSums(models, sums_limit() if hasattr(models, "engine_client") else 0)
    found = models._soka_sums
    assert isinstance(found, ServedSums)
    return found
