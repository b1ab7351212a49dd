"""lm-eval's two model classes that are used here, counting what they are asked and showing progress."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

from soka_serve.base.pretrained import open_tokenizer
from soka_serve.errors import EvalError, ServeError
from soka_serve.evaluation.prompts import is_chat
from soka_serve.io.progress import track

if TYPE_CHECKING:
    from collections.abc import Callable

    from soka_serve.base.tokenizer import TextTokenizer
    from soka_serve.serving.client import Endpoint

logger = logging.getLogger(__name__)

# Longer than any answer takes that is not lost: a CPU with many requests at once is slow.
_TIMEOUT_S = 1800
_RETRIES = 3


class _CacheHook:
    """lm-eval's cache hook, called for each answer as it comes; here it also moves the progress on."""

    def __init__(self, inner: Any, advance: Callable[[], None]) -> None:
        self._inner = inner
        self._advance = advance

    def add_partial(self, *arguments: Any) -> None:
        self._inner.add_partial(*arguments)
        self._advance()


class _RequestCounter:
    """Mixin over an lm-eval model.

    `sent` is how many prompts were really answered by it, not by a cache; `cut` how many of them were longer than the
    context leaves room for, and lost their beginning (lm-eval's way).
    """

    sent = 0
    cut = 0
    what = "answers"
    context: int
    reserved = 0

    def set_cache_hook(self, cache_hook: Any) -> None:
        super().set_cache_hook(_CacheHook(cache_hook, lambda: self._advance()))  # type: ignore[misc]

    def _advance(self) -> None:
        pass

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self.sent += len(requests)
        self.reserved = max(int(r.args[1].get("max_gen_toks", self.max_gen_toks)) for r in requests)  # type: ignore[attr-defined]
        if self.reserved >= self.context:
            raise EvalError(
                f"the task asks for answers of {self.reserved} tokens, and the context holds {self.context}",
                hint="Set [eval] max_new_tokens in the manifest, or [serve] max_model_len.",
            )
        room = self.context - self.reserved
        lengths = [len(self.tok_encode(r.args[0], add_special_tokens=True)) for r in requests]  # type: ignore[attr-defined]
        cut = sum(length > room for length in lengths)
        if cut:
            self.cut += cut
            logger.warning("%d of %d prompts have more than %d tokens and are cut at the left", cut, len(lengths), room)
        plain = not sys.stderr.isatty()  # on a terminal lm-eval's own bar is shown
        with track(len(requests), self.what, unit="answer", enabled=plain) as advance:
            self._advance = advance  # type: ignore[method-assign]
            return super().generate_until(requests, disable_tqdm=disable_tqdm or plain)  # type: ignore[misc]


class ServedModel(_RequestCounter, LocalCompletionsAPI):  # type: ignore[misc, unused-ignore]
    """A model name of a running server, asked through /v1/completions.

    Args:
        endpoint: how the server is reached.
        name: the model's name in its API.
        tokenizer: directory of the base's tokenizer: prompts are sent as the token ids that training saw.
        context: the longest context that the server takes.
        concurrency: requests at once.
    """

    def __init__(self, endpoint: Endpoint, name: str, tokenizer: Path, context: int, concurrency: int) -> None:
        self._key = endpoint.api_key
        super().__init__(
            base_url=f"{endpoint.url}/v1/completions",
            model=name,
            tokenizer_backend="none",  # lm-eval would open it its own way
            num_concurrent=max(concurrency, 2),  # at 1 lm-eval takes another way, which stores nothing in between
            max_retries=_RETRIES,
            max_length=context,
            timeout=_TIMEOUT_S,
            verify_certificate=False,
        )
        self.tokenizer = open_tokenizer(tokenizer)
        self.tokenizer_backend = "huggingface"
        self.tokenized_requests = True
        self._url = endpoint.url
        self.context = context

    @property
    def max_gen_toks(self) -> int:
        """lm-eval's default for tasks that name none."""
        return int(self._max_gen_toks)

    def tok_encode(self, string: Any, *arguments: Any, **options: Any) -> Any:
        """Token ids of a prompt, or of several, which are then cut at the left to what the answer leaves room for:
        lm-eval does that for one request at a time only."""
        texts = [string] if isinstance(string, str) else list(string)
        ids = [self.tokenizer.encode(text, add_special_tokens=not is_chat(text)) for text in texts]
        return ids[0] if isinstance(string, str) else [row[self.reserved - self.context :] for row in ids]

    @property
    def api_key(self) -> str:
        return self._key or os.environ.get("OPENAI_API_KEY", "")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """lm-eval's, but for its errors: one that names the server and the model.

        Raises:
            ServeError: a request that was not answered after several tries.
        """
        import aiohttp

        try:
            return super().generate_until(requests, disable_tqdm)
        except aiohttp.ClientResponseError as error:
            raise ServeError(
                f"{self.model}: {self._url} answered {error.status} {error.message}",
                hint="The line above has the server's own words. A prompt that is too long for the server's context "
                "needs [serve] max_model_len, or fewer few-shot examples.",
            ) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ServeError(
                f"{self.model}: {self._url} does not answer any more: {type(error).__name__}: {error}",
                hint="Run the same command again: answers that have come are kept.",
            ) from error


class LocalModel(_RequestCounter, HFLM):  # type: ignore[misc, unused-ignore]
    """A model of transformers in this process.

    Args:
        model: of transformers, with or without an adapter.
        tokenizer: of the base, opened from a folder.
        context: the longest context.
        batch_size: sequences at once.
    """

    def __init__(self, model: Any, tokenizer: TextTokenizer, context: int, batch_size: int) -> None:
        self._reader = tokenizer
        opened = open_tokenizer(Path(tokenizer.directory))
        if opened.pad_token is None:  # lm-eval would add a token that the model has no embedding for
            opened.pad_token = opened.convert_ids_to_tokens(tokenizer.pad_id)
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=opened,
            trust_remote_code=False,
            batch_size=batch_size,
            max_length=context,
            add_bos_token=True,
        )
        self.context = context

    @property
    def eot_token_id(self) -> int:
        """The id that ends an answer, also where the tokenizer names none."""
        return self._reader.eos_id

    def tok_batch_encode(self, strings: list[str], *arguments: Any, **options: Any) -> Any:
        """lm-eval's, for prompts of one task: all of them are rendered chats, or none is."""
        self.add_bos_token = not is_chat(strings[0])
        return super().tok_batch_encode(strings, *arguments, **options)

    def tok_decode(self, tokens: int | list[int], skip_special_tokens: bool = True) -> str:
        """Text of an id, or of an answer, which is decoded behind a letter: alone, it may lose a space."""
        if isinstance(tokens, int):
            return self._reader.decode([tokens], skip_special_tokens=skip_special_tokens)
        (letter,) = self._reader.encode_texts(["a"])
        return self._reader.decode_after(letter + tokens, len(letter), skip_special_tokens=skip_special_tokens)
