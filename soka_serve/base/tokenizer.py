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


@dataclass(frozen=True)
class TokenizerSettings:
    """What a reader made of a checkpoint's tokenizer files, beside the backend.

    Args:
        reader: whose reading it is: 'tokenizer.json', or the name of transformers' class.
        special_tokens: 'bos_token', 'eos_token', … as text, by name.
        chat_template: Jinja2 source, or None.
        split: whether special tokens in a text are cut up like any other.
    """

    reader: str
    special_tokens: Mapping[str, str]
    chat_template: str | None = None
    split: bool = False


class TextTokenizer:
    """A checkpoint's tokenizer.

    Args:
        backend: of the tokenizers library; its padding and truncation are switched off.
        settings: what is known of it.
        ends: ids at which the checkpoint's config has generation end; the first is the EOS where no token is named so.
        directory: of the files, for messages.

    Attributes:
        eos_id: id that ends a completion.
        stop_ids: ids at which servers end an answer, `eos_id` among them.
        pad_id: id that fills rows up; the EOS id where the tokenizer has no pad token (the fill is masked anyway).
        suffix: ids that are put behind every text that gets special tokens, such as an EOS. Prompts never have them.

    Raises:
        CheckpointError: no EOS token anywhere, or the backend cannot read text.
    """

    def __init__(
        self,
        backend: Tokenizer,
        settings: TokenizerSettings,
        ends: Sequence[int] = (),
        directory: Path | str = "the tokenizer",
    ) -> None:
        # tokenizer.json may carry padding or truncation of the run that saved it.
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = settings.split
        self.backend, self.settings, self.directory = backend, settings, directory
        named = {name: backend.token_to_id(token) for name, token in settings.special_tokens.items()}
        stops = [number for number in (named.get("eos_token"), *ends) if number is not None]
        if not stops:
            raise CheckpointError(
                f"{directory}: no EOS token in tokenizer_config.json, special_tokens_map.json or config.json",
                hint="Completions end in EOS; without one the model never learns to stop.",
            )
        self.stop_ids = tuple(dict.fromkeys(stops))
        self.eos_id = self.stop_ids[0]
        pad_id = named.get("pad_token")
        self.pad_id = self.eos_id if pad_id is None else pad_id
        (probe,) = read_texts(backend, ["a"], settings.reader, directory, special=True)
        leading = next((i for i, special in enumerate(probe.special_tokens_mask) if not special), len(probe.ids))
        trailing = next((i for i, special in enumerate(probe.special_tokens_mask[::-1]) if not special), 0)
        self._prefix: list[int] = list(probe.ids[:leading])
        self.suffix: list[int] = list(probe.ids[len(probe.ids) - trailing :])
        (plain,) = self.encode_texts(["a"])
        # SentencePiece-like tokenizers write a space before the text; a completion must not get one of its own.
        self._adds_space = bool(plain) and str(backend.id_to_token(plain[0]))[:1] in ("▁", "Ġ")

    @classmethod
    def of(cls, backend: Tokenizer, settings: TokenizerSettings, folder: ModelFolder) -> TextTokenizer:
        """A checkpoint's tokenizer, where its backend and settings have been read."""
        return cls(backend, settings, _config_ends(folder), folder.directory)

    @classmethod
    def from_folder(cls, folder: ModelFolder) -> TextTokenizer:
        """tokenizer.json as it stands, which is what transformers makes of files that `reads_plainly` finds plain.

        Raises:
            CheckpointError: no tokenizer.json (with a hint where there is only tokenizer.model), broken files, or no
                EOS token anywhere.
        """
        said = folder.json("tokenizer_config.json")
        special = {name: str(said[name]) for name in SPECIAL_NAMES if said.get(name) is not None}
        return cls.of(folder.backend, TokenizerSettings("tokenizer.json", special, _chat_template(folder)), folder)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode_prompts(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of prompts, as a server tokenises them: BOS first where the tokenizer adds one, no EOS at the end.

        `add_special_tokens=False` is for texts that carry their own, such as rendered chats.
        """
        prefix = self._prefix if add_special_tokens else []
        return [prefix + ids for ids in self.encode_texts(texts)]

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
        return [list(e.ids) for e in read_texts(self.backend, texts, self.settings.reader, self.directory)]

    def _ends(self, completion: str, ids: Sequence[int]) -> bool:
        """Whether a completion brings its own EOS: as its last id, or, in chats, followed by white space only."""
        if ids and ids[-1] == self.eos_id:
            return True
        eos = self.backend.id_to_token(self.eos_id)
        return eos is not None and completion.rstrip().endswith(eos)

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

    def decode_after(self, ids: Sequence[int], start: int, *, skip_special_tokens: bool = False) -> str:
        """Text of `ids[start:]` as it stands behind the others: alone it may lose a space that it begins with."""
        whole, head = (self.decode(part, skip_special_tokens=skip_special_tokens) for part in (ids, ids[:start]))
        if whole.startswith(head):
            return whole[len(head) :]
        return self.decode(ids[start:], skip_special_tokens=skip_special_tokens)

    def render_many(self, chats: Sequence[tuple[Sequence[Mapping[str, Any]], bool]]) -> list[str | DataError]:
        """Render chats, (messages, add_generation_prompt) each, by the chat template; errors stand in place of texts.

        The texts carry their own special tokens.

        Raises:
            DataError: the tokenizer has no chat template.
        """
        if not isinstance(self.settings.chat_template, str):
            raise DataError(
                f"{self.directory}: no chat template, but train.data.messages asks for one",
                hint="Use prompt and completion templates instead, or a base with a chat template.",
            )
        return render_chats(
            self.settings.chat_template,
            chats,
            special_tokens=self.settings.special_tokens,
            name=f"the chat template of {self.directory}",
        )


def read_texts(
    backend: Tokenizer, texts: Sequence[str], reader: str, directory: Path | str, *, special: bool = False
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
            f"{directory}: {reader} cannot read text: {error}",
            hint="tokenizer_config.json may name a tokenizer_class that does not fit tokenizer.json; "
            "PreTrainedTokenizerFast takes it as it stands",
        ) from None


def _config_ends(folder: ModelFolder) -> list[int]:
    """Ids at which generation ends, as vLLM takes them: of the generation config, else of the config."""
    for name in ("generation_config.json", "config.json"):
        value = folder.json(name).get("eos_token_id")
        ends = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
        if ends:
            return ends
    return []


def _chat_template(folder: ModelFolder) -> str | None:
    file = folder.directory / "chat_template.jinja"
    if not file.is_file():
        return folder.json("tokenizer_config.json").get("chat_template")
    try:
        return folder.content(file.name).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
