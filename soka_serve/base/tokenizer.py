"""Text to token ids and back.

A `TextTokenizer` works on a tokenizer of the tokenizers library: the one in `tokenizer.json` as it stands
(`from_folder`), or the one that transformers makes of a checkpoint's files (`soka_serve.base.served_tokenizer`),
which is what servers read prompts with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from soka_serve.base.folder import ModelFolder
from soka_serve.errors import CheckpointError, DataError
from soka_serve.manifest.templates import render_chats

_MAX_TEMPLATE_BYTES = 1 << 20
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenPair:
    """A tokenised prompt and completion.

    `input_ids[:prompt_length]` are the prompt's ids, exactly as it tokenises alone.
    `boundary` is True when tokenising the joined text would have merged a token across the border.
    """

    input_ids: list[int]
    prompt_length: int
    boundary: bool


class TextTokenizer:
    """A checkpoint's tokenizer.

    Attributes:
        eos_id: id that ends a completion.
        pad_id: id that fills rows up; the EOS id where the tokenizer has no pad token (the fill is masked anyway).
        special_tokens: 'bos_token', 'eos_token', … as text, by name.
        chat_template: Jinja2 source, or None.
        directory: of the files; None for a tokenizer that was not read from any.
        reader: whose reading it is: 'tokenizer.json', or the name of transformers' class.
        backend: of the tokenizers library.
        suffix: ids that are put behind every text that gets special tokens, such as an EOS. Prompts never have them.
    """

    def __init__(
        self,
        backend: Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_id: int,
        chat_template: str | None = None,
        directory: Path | None = None,
        reader: str = "tokenizer.json",
    ) -> None:
        # tokenizer.json may carry padding or truncation of the run that saved it.
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.reader = reader
        self.special_tokens = dict(special_tokens)
        self.eos_id = eos_id
        pad_id = _token_id(backend, self.special_tokens.get("pad_token"), "pad_token", directory)
        self.pad_id = eos_id if pad_id is None else pad_id
        self.chat_template = chat_template
        self.directory = directory
        (probe,) = read_texts(backend, ["a"], reader, directory, special=True)
        leading = next((i for i, special in enumerate(probe.special_tokens_mask) if not special), len(probe.ids))
        trailing = next((i for i, special in enumerate(probe.special_tokens_mask[::-1]) if not special), 0)
        self._prefix: list[int] = list(probe.ids[:leading])
        self.suffix: list[int] = list(probe.ids[len(probe.ids) - trailing :])
        (plain,) = read_texts(backend, ["a"], reader, directory)
        # SentencePiece-like tokenizers write a space before the text; a completion must not get one of its own.
        self._adds_space = bool(plain.ids) and str(backend.id_to_token(plain.ids[0]))[:1] in ("▁", "Ġ")

    @classmethod
    def from_folder(cls, folder: ModelFolder) -> TextTokenizer:
        """tokenizer.json as it stands, with the special tokens that the files beside it name.

        Raises:
            CheckpointError: no tokenizer.json (with a hint where there is only tokenizer.model), broken files, or no
                EOS token anywhere.
        """
        special = _special_tokens(folder.json("special_tokens_map.json"), folder.json("tokenizer_config.json"))
        return cls.of(folder.backend, special, folder)

    @classmethod
    def of(
        cls, backend: Tokenizer, special_tokens: Mapping[str, str], folder: ModelFolder, reader: str = "tokenizer.json"
    ) -> TextTokenizer:
        """A checkpoint's tokenizer, where its backend and special tokens have been read.

        Args:
            backend: of the tokenizers library; its padding and truncation are switched off.
            special_tokens: as text, by name.
            folder: of the checkpoint, for the EOS token of its config, its chat template, and messages.
            reader: whose reading it is.

        Raises:
            CheckpointError: a special token that the backend does not have, or no EOS token anywhere.
        """
        directory = folder.directory
        special = dict(special_tokens)
        eos_id = _token_id(backend, special.get("eos_token"), "eos_token", directory)
        if eos_id is None:
            eos_id = _config_eos(folder)
            if eos_id is None:
                raise CheckpointError(
                    f"{directory}: no EOS token in tokenizer_config.json, special_tokens_map.json or config.json",
                    hint="Completions end in EOS; without one the model never learns to stop.",
                )
            special["eos_token"] = backend.id_to_token(eos_id) or ""
        return cls(
            backend,
            special_tokens=special,
            eos_id=eos_id,
            chat_template=_chat_template(folder),
            directory=directory,
            reader=reader,
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode_prompt(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a prompt, as a server tokenises it: BOS first where the tokenizer adds one, no EOS at the end.

        `add_special_tokens=False` is for text that carries its own, such as a rendered chat.
        """
        ids = self.encode_texts([text])[0]
        return self._prefix + ids if add_special_tokens else ids

    def encode_pairs(self, pairs: Sequence[tuple[str, str]], *, add_special_tokens: bool = True) -> list[TokenPair]:
        """Prompts and completions, each with an EOS behind it (tokenised in parallel).

        A prompt's ids are those that it has alone, so that training and evaluation see the same prompt.
        """
        prompts = self.encode_texts([prompt for prompt, _ in pairs])
        joined = self.encode_texts([prompt + completion for prompt, completion in pairs])
        prefix = self._prefix if add_special_tokens else []
        encoded = []
        for (_, completion), prompt_ids, joint_ids in zip(pairs, prompts, joined, strict=True):
            boundary = joint_ids[: len(prompt_ids)] != prompt_ids
            tail = self._encode_inner(completion) if boundary else joint_ids[len(prompt_ids) :]
            ids = [*prefix, *prompt_ids, *tail]
            if not self._ends(completion, tail):
                ids.append(self.eos_id)
            encoded.append(TokenPair(ids, len(prefix) + len(prompt_ids), boundary))
        return encoded

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text alone, without special tokens put before or behind it."""
        return [list(e.ids) for e in read_texts(self.backend, texts, self.reader, self.directory)]

    def _ends(self, completion: str, ids: Sequence[int]) -> bool:
        """Whether a completion brings its own EOS: as its last id, or, in chats, followed by white space only."""
        if ids and ids[-1] == self.eos_id:
            return True
        eos = self.special_tokens.get("eos_token")
        return bool(eos) and completion.rstrip().endswith(str(eos))

    def _encode_inner(self, text: str) -> list[int]:
        """Ids of a text in the middle of a line: without the space that some tokenizers put before every text."""
        if self._adds_space:
            # After a line feed there is no such space; the line feed's own ids are then cut off.
            lead = self.encode_texts(["\n"])[0]
            ids = self.encode_texts(["\n" + text])[0]
            if ids[: len(lead)] == lead:
                return ids[len(lead) :]
        return self.encode_texts([text])[0]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def render_many(self, chats: Sequence[tuple[Sequence[Mapping[str, Any]], bool]]) -> list[str | DataError]:
        """Render chats, (messages, add_generation_prompt) each, by the chat template; errors stand in place of texts.

        The texts carry their own special tokens.

        Raises:
            DataError: the tokenizer has no chat template.
        """
        if self.chat_template is None:
            raise DataError(
                f"{self.directory or 'the tokenizer'}: no chat template, but train.data.messages asks for one",
                hint="Use prompt and completion templates instead, or a base with a chat template.",
            )
        return render_chats(
            self.chat_template,
            chats,
            special_tokens=self.special_tokens,
            name=f"the chat template of {self.directory or 'the tokenizer'}",
        )


def read_texts(
    backend: Tokenizer, texts: Sequence[str], reader: str, directory: Path | None, *, special: bool = False
) -> list[Encoding]:
    """Texts as encodings of the tokenizers library.

    Args:
        backend: the tokenizer.
        texts: each is read alone.
        reader, directory: whose reading it is, and of which files, for messages.
        special: whether tokens are put before and behind each text.

    Raises:
        CheckpointError: the tokenizer's parts do not fit each other, as where it has no token for what is unknown.
    """
    try:
        return list(backend.encode_batch_fast(list(texts), add_special_tokens=special))
    except Exception as error:  # noqa: BLE001  (tokenizers raises bare Exception)
        raise CheckpointError(
            f"{directory or 'the tokenizer'}: {reader} cannot read text: {error}",
            hint="tokenizer_config.json may name a tokenizer_class that does not fit tokenizer.json; "
            "PreTrainedTokenizerFast takes it as it stands",
        ) from None


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens as text; later sources win. A token is a string or {"content": …}."""
    tokens: dict[str, str] = {}
    for source in sources:
        for name in SPECIAL_NAMES:
            value = source.get(name)
            if isinstance(value, Mapping):
                value = value.get("content")
            if isinstance(value, str):
                tokens[name] = value
    return tokens


def _token_id(backend: Tokenizer, token: str | None, name: str, directory: Path | None) -> int | None:
    if token is None:
        return None
    found = backend.token_to_id(token)
    if found is None:
        raise CheckpointError(
            f"{directory or 'the tokenizer'}: {name} is {token!r}, which tokenizer.json does not have"
        )
    return int(found)


def _config_eos(folder: ModelFolder) -> int | None:
    for name in ("generation_config.json", "config.json"):
        value = folder.json(name).get("eos_token_id")
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int):
            return value
    return None


def _chat_template(folder: ModelFolder) -> str | None:
    file = folder.directory / "chat_template.jinja"
    if file.is_file():
        content = folder.content(file.name)
        if len(content) > _MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"{file}: {len(content)} bytes, too large: at most {_MAX_TEMPLATE_BYTES} are read")
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: cannot be read: {error}") from None
    template = folder.json("tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None
