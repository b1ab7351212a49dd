"""A base's tokenizer as servers open it, by transformers, and how its reading of the training text is checked.

Only `open_backend` imports transformers; `read_served` has a child process do so, for planning, which does without
torch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from soka_serve.base.folder import ModelFolder
from soka_serve.base.tokenizer import TextTokenizer, TokenizerSettings, read_texts
from soka_serve.errors import CheckpointError

_CHUNK = 512  # Examples compared per call.
_SHOWN_TOKENS, _SHOWN_TEXT = 12, 100
_CHILD_S = 300.0
# torch takes most of the time of importing transformers, and no tokenizer needs it.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); sys.modules['torch'] = None; "
    "from soka_serve.base.served_tokenizer import answer_parent; answer_parent(sys.argv[2])"
)
_HINT_CLASS = (
    "tokenizer.json is what the base was trained with, as a rule: set tokenizer_class to PreTrainedTokenizerFast in "
    "tokenizer_config.json, which has every server take tokenizer.json as it stands; a base from the hub wants a copy "
    "for that (base.path)"
)


class ExampleText(Protocol):
    """A training example's text; `templated` where it carries its own special tokens."""

    @property
    def prompt(self) -> str: ...
    @property
    def completion(self) -> str: ...
    @property
    def templated(self) -> bool: ...


# Its own methods do something for text with <FILL_ME> only.
_SAME_FOR_TEXT = ("CodeLlamaTokenizer",)


def open_served(folder: ModelFolder) -> TextTokenizer:
    """The tokenizer as servers open it.

    Args:
        folder: with the tokenizer's files and config.json, see `tokenizer_class.tokenizer_directory`.

    Raises:
        CheckpointError: transformers makes no tokenizer of the files, or reads it with a class that has no backend of
            the tokenizers library, or one that changes what goes in.
    """
    _ = folder.backend  # says what is wrong with tokenizer.json; a class may do without it
    return TextTokenizer.of(*open_backend(folder.directory), folder)


def read_served(folder: ModelFolder) -> TextTokenizer:
    """As `open_served`, by a process of its own, which imports transformers without torch.

    Raises:
        CheckpointError: as `open_served`, or the process does not end well.
    """
    _ = folder.backend
    directory = folder.directory
    kept = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _BOOT, json.dumps([path or str(Path.cwd()) for path in sys.path]), str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_CHILD_S, env=kept, check=False)
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{directory}: opening its tokenizer has taken {_CHILD_S:.0f} s; given up") from None
    except ValueError:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise CheckpointError(
            f"{directory}: the process that opens its tokenizer ended with {done.returncode}: {' '.join(last)}"
        ) from None
    if "error" in answer:
        raise CheckpointError(answer["error"], hint=answer["hint"])
    return TextTokenizer.of(Tokenizer.from_str(answer["backend"]), TokenizerSettings(**answer["settings"]), folder)


def answer_parent(directory: str) -> None:
    """In the process of `read_served`: open the tokenizer in `directory`, and write it, or the error, as JSON."""
    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no part of it
    try:
        backend, settings = open_backend(Path(directory))
        value: dict[str, Any] = {"settings": asdict(settings), "backend": backend.to_str()}
    except CheckpointError as error:
        value = {"error": error.message, "hint": error.hint}
    with os.fdopen(answer, "w", encoding="utf-8") as stream:
        json.dump(value, stream)


def open_backend(directory: Path) -> tuple[Tokenizer, TokenizerSettings]:
    """The backend of a tokenizer that transformers opens, and what else is known of it.

    Raises:
        CheckpointError: as `open_served`.
    """
    from transformers import PreTrainedTokenizerFast

    from soka_serve.base.pretrained import open_tokenizer

    tokenizer = open_tokenizer(directory)
    reader = type(tokenizer).__name__
    own = [
        name
        for name in ("__call__", "_encode_plus", "encode")
        if getattr(type(tokenizer), name) is not getattr(PreTrainedTokenizerFast, name)
    ]
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or (own and reader not in _SAME_FOR_TEXT):
        raise CheckpointError(
            f"{directory}: transformers reads this tokenizer with {reader}, which works on text itself; expected a "
            "class that leaves it to the tokenizers library",
            hint=_HINT_CLASS,
        )
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    split = bool(tokenizer.split_special_tokens)
    return tokenizer.backend_tokenizer, TokenizerSettings(reader, tokenizer.special_tokens_map, template, split)


def check_reading(served: TextTokenizer, examples: Sequence[ExampleText], folder: ModelFolder) -> int:
    """Hold a server's reading of the training text against tokenizer.json's.

    They may differ, and the server's counts: LLaMA 2's class, for one, puts no space before a text that has one. What
    is refused is a class that loses text which tokenizer.json keeps, and tokens that the base has no embedding for.

    Args:
        served: the tokenizer as servers open it.
        examples: all that is trained on.
        folder: the tokenizer's.

    Returns:
        How many examples tokenizer.json alone would read otherwise.

    Raises:
        CheckpointError: what cannot be right in serving; shows text and tokens of both.
    """
    directory, plain = folder.directory, folder.backend
    _check_suffix(served, examples, directory)
    differing = 0
    embedded = _embedded(folder.json("config.json"), served)
    if _same(plain, served.backend) and embedded is None:
        return 0
    for start in range(0, len(examples), _CHUNK):
        texts = [e.prompt + e.completion for e in examples[start : start + _CHUNK]]
        ours = served.encode_texts(texts)
        theirs = [encoding.ids for encoding in read_texts(plain, texts, "tokenizer.json", directory)]
        for text, ids, other in zip(texts, ours, theirs, strict=True):
            if embedded is not None:
                _check_embedded([*ids, served.eos_id, served.pad_id], embedded, served, directory)
            if ids != other:
                differing += 1
                if not _keeps(text, ids, served.backend) and _keeps(text, other, plain):
                    raise _garbled(text, ids, other, served, folder)
    return differing


def reading_note(reader: str, differing: int, examples: int) -> str:
    """In words, what `check_reading` has counted."""
    return (
        f"tokens are those of {reader}, which servers read text with; tokenizer.json alone would read {differing:,} of "
        f"{examples:,} examples otherwise"
    )


def _check_suffix(served: TextTokenizer, examples: Iterable[ExampleText], directory: Path) -> None:
    if not served.suffix or all(e.templated for e in examples):
        return
    text = next(e.prompt for e in examples if not e.templated)
    ids = served.encode_prompts([text])[0]
    raise CheckpointError(
        f"{directory}: the tokenizer puts {_tokens(served.suffix, served.backend)} behind every "
        "text, so that a server's prompts end in it, and the answer of a model would begin after the end\n"
        f"  text: {_cut(text)}\n"
        f"  training: {_show(ids, len(ids), served.backend)}\n"
        f"  serving: {_show([*ids, *served.suffix], len(ids), served.backend)}",
        hint="take the token out of the post_processor in tokenizer.json; the training puts one behind each answer",
    )


def _embedded(config: Mapping[str, Any], served: TextTokenizer) -> int | None:
    """For how many tokens the base has embeddings, where that is fewer than there are."""
    inner = config.get("text_config")
    sizes = [part.get("vocab_size") for part in (config, inner) if isinstance(part, Mapping)]
    size = next((size for size in sizes if isinstance(size, int)), None)
    return size if size is not None and size < served.vocab_size else None


def _check_embedded(ids: Sequence[int], embedded: int, served: TextTokenizer, directory: Path) -> None:
    beyond = [number for number in ids if number >= embedded]
    if beyond:
        raise CheckpointError(
            f"{directory}: {_tokens(beyond[:1], served.backend)} has the id {beyond[0]} as {served.settings.reader} "
            f"reads it; config.json says vocab_size = {embedded}, so the base has no embedding for it",
            hint="the token is named in tokenizer_config.json, special_tokens_map.json or added_tokens.json, and not "
            "in the vocabulary that the base was trained with: name the base's own token there",
        )


def _same(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers have the same parts, and so read every text alike."""
    if one.encode_special_tokens != other.encode_special_tokens:
        return False
    return bool(one.to_str() == other.to_str())


def _keeps(text: str, ids: Sequence[int], backend: Tokenizer) -> bool:
    """Whether a text comes back from its tokens, but for Unicode's composition and spaces beside special tokens."""
    special = [token.content for token in backend.get_added_tokens_decoder().values()]
    back = str(backend.decode(list(ids), skip_special_tokens=False))
    return _pieces(text, special) == _pieces(back, special)


def _pieces(text: str, special: Sequence[str]) -> list[str]:
    parts = re.split("|".join(map(re.escape, special)), text) if special else [text]
    return [unicodedata.normalize("NFC", part).strip() for part in parts]


def _garbled(
    text: str, ids: Sequence[int], other: Sequence[int], served: TextTokenizer, folder: ModelFolder
) -> CheckpointError:
    settings = folder.directory / "tokenizer_config.json"
    named: Any = folder.json(settings.name).get("tokenizer_class")
    first = next((i for i, pair in enumerate(zip(ids, other, strict=False)) if pair[0] != pair[1]), 0)
    back = str(served.backend.decode(list(ids), skip_special_tokens=False))
    return CheckpointError(
        f"{settings}: tokenizer_class {named!r:.100}: transformers, and so every server, reads text with "
        f"{served.settings.reader}, which does not fit tokenizer.json and loses text that tokenizer.json keeps\n"
        f"  text: {_cut(text)}\n"
        f"  tokenizer.json: {_show(other, first, folder.backend)}\n"
        f"  {served.settings.reader}: {_show(ids, first, served.backend)}\n"
        f"  which reads back as: {_cut(back)}",
        hint=_HINT_CLASS,
    )


def _show(ids: Sequence[int], at: int, backend: Tokenizer) -> str:
    """Some ids from shortly before one of them, with their tokens."""
    start = max(0, min(at - 3, len(ids) - _SHOWN_TOKENS))
    shown = list(ids[start : start + _SHOWN_TOKENS])
    before, after = "… " if start else "", " …" if start + len(shown) < len(ids) else ""
    return f"{before}{shown}{after} {_tokens(shown, backend)}"


def _tokens(ids: Sequence[int], backend: Tokenizer) -> str:
    return " ".join(repr(backend.id_to_token(number)) for number in ids)


def _cut(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_TEXT else text[: _SHOWN_TEXT - 1] + "…")
