"""The tokenizer without transformers, held against transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from soka_serve.base.base import Base
from soka_serve.base.folder import ModelFolder
from soka_serve.base.served_tokenizer import check_reading
from soka_serve.base.tokenizer import TextTokenizer, TokenizerSettings
from soka_serve.base.tokenizer_class import reads_plainly
from soka_serve.builtin import base_directory
from soka_serve.builtin.tasks import generate
from soka_serve.data.encode import MASKED, encode_examples
from soka_serve.data.examples import Example
from soka_serve.errors import CheckpointError
from soka_serve.manifest.templates import render_chats

# Written for this test in the manner of the public ones: Llama 2's brackets, ChatML, and one with every feature we use.
BRACKETS = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = """{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You help.<|im_end|>
    {% endif %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
{{ '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{{- '\n' }}{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
FEATURES = (
    "{{ bos_token }}{{ messages | tojson }}{{ {'b': '<é>', 'a': 1} | tojson(indent=2, sort_keys=true) }}"
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content | trim | upper }}{% endfor %}"
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{% if tools is not none %}tools{% endif %}{{ strftime_now('%Y') | length }}{{ eos_token }}"
)
CHATS: dict[str, list[dict[str, str]]] = {
    "one turn": [{"role": "user", "content": "What is 2 + 3? "}, {"role": "assistant", "content": "It is 5."}],
    "two turns": [
        {"role": "user", "content": "a <b> & 'c'"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "é\n\nf"},
        {"role": "assistant", "content": "g\n"},
    ],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
    ],
}
TEXTS = [
    "Question: 12 + 30 = 42\nAnswer:",
    " leading",
    "trailing ",
    "two  spaces\n\n\nlines",
    "ünïcödé 日本 🙂",
    "</s> inside <s>",
    "a",
    "",
    "tab\tand \\boxed{3}",
]


def corpus() -> list[str]:
    return [p.prompt + p.completion for p in generate("math", "train", 200)]


def build_llama2() -> Tokenizer:
    """SentencePiece-like: a space put before every text, spaces as ▁, byte fallback; the layout of Llama 2's file."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]],
        show_progress=False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer = Tokenizer.from_str(_plain_bytes(tokenizer.to_str()))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def _plain_bytes(text: str) -> str:
    """Byte tokens are ordinary vocabulary, not special tokens, and there is no pre-tokenizer."""
    value = json.loads(text)
    value["added_tokens"] = [t for t in value["added_tokens"] if not t["content"].startswith("<0x")]
    value["pre_tokenizer"] = None
    return json.dumps(value)


def build_llama3() -> Tokenizer:
    """Byte-level BPE with header tokens; the layout of Llama 3's file."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def build_plain() -> Tokenizer:
    """Byte-level BPE that puts no BOS before the text; the layout of Qwen 2's file."""
    tokenizer = build_llama3()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


LLAMA_CLASS = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}


def save(tokenizer: Tokenizer, directory: Path, **settings_: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | settings_
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


BUILDERS: dict[str, Callable[[], Tokenizer]] = {"llama2": build_llama2, "llama3": build_llama3, "plain": build_plain}


@pytest.fixture(scope="module", params=[*BUILDERS, "llama2 class", "llama2 legacy class", "tiny"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer of each kind, the embedded base's included."""
    if request.param == "tiny":
        return base_directory()
    kind, _, rest = request.param.partition(" ")
    options = LLAMA_CLASS | {"legacy": "legacy" in rest} if rest else {}
    return save(BUILDERS[kind](), tmp_path_factory.mktemp(kind), chat_template=BRACKETS, **options)


@pytest.fixture(scope="module")
def both(directory: Path) -> tuple[TextTokenizer, Any]:
    from transformers import AutoTokenizer

    return Base(directory).tokenizer, AutoTokenizer.from_pretrained(directory)


# ---------------------------------------------------------------------------------------- parity with transformers


@pytest.mark.parametrize("text", TEXTS)
def test_prompt_ids_are_transformers(both: tuple[TextTokenizer, Any], text: str) -> None:
    ours, theirs = both
    assert ours.encode_prompts([text])[0] == theirs(text)["input_ids"]
    assert (
        ours.encode_prompts([text], add_special_tokens=False)[0] == theirs(text, add_special_tokens=False)["input_ids"]
    )


def test_special_tokens_are_transformers(both: tuple[TextTokenizer, Any]) -> None:
    ours, theirs = both
    assert ours.eos_id == theirs.eos_token_id
    assert ours.settings.special_tokens == theirs.special_tokens_map
    assert ours.pad_id == (theirs.eos_token_id if theirs.pad_token_id is None else theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)


def test_a_faithful_class_that_differs_is_no_fault(directory: Path) -> None:
    """LLaMA 2's class puts no space before a text that begins with one; it loses nothing else."""
    examples = [Example(text, " 3") for text in TEXTS]
    differing = check_reading(Base(directory).tokenizer, examples, ModelFolder(directory))
    assert (differing > 0) == ("LlamaTokenizer" in (directory / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("text", TEXTS[:5])
def test_decoding_is_transformers(both: tuple[TextTokenizer, Any], text: str) -> None:
    ours, theirs = both
    ids = theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


def test_a_chat_knows_no_eos_where_the_tokenizer_names_none(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save(build_llama3(), tmp_path, eos_token=None, chat_template=FEATURES)
    (tmp_path / "config.json").write_text('{"eos_token_id": 1, "model_type": "llama"}')
    chat = CHATS["one turn"]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(chat, tokenize=False)
    assert Base(tmp_path).tokenizer.render_many([(chat, False)]) == [theirs]


@pytest.mark.parametrize("template", [BRACKETS, CHATML, FEATURES, None])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("generation", [False, True])
def test_chats_are_transformers(
    both: tuple[TextTokenizer, Any], template: str | None, chat: str, generation: bool
) -> None:
    ours, theirs = both
    source = template or ours.settings.chat_template
    assert source
    options = {"add_generation_prompt": generation}
    chats = [(CHATS[chat], generation)]
    (text,) = render_chats(source, chats, special_tokens=ours.settings.special_tokens)
    assert isinstance(text, str)
    assert text == theirs.apply_chat_template(CHATS[chat], chat_template=source, tokenize=False, **options)
    ids = theirs.apply_chat_template(CHATS[chat], chat_template=source, return_dict=False, **options)
    assert ours.encode_prompts([text], add_special_tokens=False)[0] == ids


# ------------------------------------------------------------------------------------------------ prompt and answer


def test_prompts_tokenise_alike_in_training_and_evaluation(both: tuple[TextTokenizer, Any]) -> None:
    ours, theirs = both
    problems = generate("math", "train", 40)
    rules = SimpleNamespace(max_length=4096, overlong="drop", completion_only=True)
    found = encode_examples([Example(p.prompt, p.completion) for p in problems], ours, rules)
    for problem, encoded in zip(problems, found.examples, strict=True):
        prompt = theirs(problem.prompt)["input_ids"]
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels == [MASKED] * len(prompt) + encoded.input_ids[len(prompt) :]
        assert encoded.input_ids[-1] == ours.eos_id
        text = ours.decode(encoded.input_ids, skip_special_tokens=True)
        assert text == problem.prompt + problem.completion


words = st.text(alphabet="ab 12\n.é:", max_size=12)


@settings(max_examples=80, deadline=None)
@given(prompt=words, completion=words)
@pytest.mark.parametrize("kind", BUILDERS)
def test_pairs_hold_the_prompt_and_the_text(kind: str, prompt: str, completion: str) -> None:
    ours = _cached(kind)
    ids, length = _pair(ours, prompt, completion)
    assert ids[:length] == ours.encode_prompts([prompt])[0]
    assert ids[-1] == ours.eos_id
    # The SentencePiece-like decoder takes one leading space off, the one that its normaliser put there.
    assert ours.decode(ids, skip_special_tokens=True) == prompt + completion


def _pair(tokenizer: TextTokenizer, prompt: str, completion: str) -> tuple[list[int], int]:
    (pair,) = tokenizer.encode_pairs([(prompt, completion)])
    return pair.input_ids, pair.prompt_length


@cache
def _cached(kind: str) -> TextTokenizer:
    return TextTokenizer(BUILDERS[kind](), TokenizerSettings("test", {"eos_token": "</s>"}))


def test_a_token_across_the_border_is_split_and_counted() -> None:
    ours = _cached("llama3")
    assert ours.encode_prompts(["Answer"])[0] != ours.encode_prompts(["Ans"])[0] + ours.encode_prompts(["wer"])[0][1:]
    ids, length = _pair(ours, "Ans", "wer")
    assert ids == [
        *ours.encode_prompts(["Ans"])[0],
        *ours.encode_prompts(["wer"], add_special_tokens=False)[0],
        ours.eos_id,
    ]
    assert length == len(ours.encode_prompts(["Ans"])[0])
    rules = SimpleNamespace(max_length=99, overlong="drop", completion_only=True)
    found = encode_examples([Example("Ans", "wer"), Example("Answer:", " 3")], ours, rules)
    assert found.boundary == 1


def test_a_split_completion_gets_no_space_of_its_own() -> None:
    ours = _cached("llama2")
    ids, length = _pair(ours, "Ans", "wer")
    assert ours.decode(ids[:-1], skip_special_tokens=True) == "Answer"
    assert not ours.decode(ids[length:-1]).startswith(" ")


# ------------------------------------------------------------------------------------------------------------ files


def test_only_a_sentencepiece_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"only tokenizer\.model") as caught:
        TextTokenizer.from_folder(ModelFolder(tmp_path))
    assert "save_pretrained" in str(caught.value.hint)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        TextTokenizer.from_folder(ModelFolder(tmp_path))


def test_broken_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        TextTokenizer.from_folder(ModelFolder(tmp_path))
    save(build_plain(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        TextTokenizer.from_folder(ModelFolder(tmp_path))


def test_where_the_ends_come_from(tmp_path: Path) -> None:
    save(build_plain(), tmp_path, eos_token=None)
    with pytest.raises(CheckpointError, match="no EOS token"):
        Base(tmp_path).tokenizer  # noqa: B018
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert Base(tmp_path).tokenizer.stop_ids == TextTokenizer.from_folder(ModelFolder(tmp_path)).stop_ids == (3,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_start|>"}}')
    ours = Base(tmp_path).tokenizer
    assert (ours.eos_id, ours.stop_ids) == (2, (2, 0, 1))


def test_saved_padding_and_truncation_are_switched_off(tmp_path: Path) -> None:
    tokenizer = build_plain()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    ours = TextTokenizer.from_folder(ModelFolder(save(tokenizer, tmp_path)))
    assert 2 < len(ours.encode_prompts(["Question: what?"])[0]) < 50


def test_chat_template_file_wins(tmp_path: Path) -> None:
    save(build_plain(), tmp_path, chat_template="one")
    assert TextTokenizer.from_folder(ModelFolder(tmp_path)).settings.chat_template == "one"
    (tmp_path / "chat_template.jinja").write_text("two")
    assert TextTokenizer.from_folder(ModelFolder(tmp_path)).settings.chat_template == "two"


@pytest.mark.parametrize("place", ["tokenizer_config.json", "additional_chat_templates"])
def test_one_of_several_chat_templates(tmp_path: Path, place: str) -> None:
    named = [{"name": "default", "template": "one"}, {"name": "x", "template": "2"}]
    save(build_plain(), tmp_path, chat_template=named if place == "tokenizer_config.json" else "in the config")
    if place == "additional_chat_templates":
        (tmp_path / place).mkdir()
        (tmp_path / place / "x.jinja").write_text("2")
    assert not reads_plainly(ModelFolder(tmp_path))
    # transformers leaves the config's template aside where files have others, and has no default then.
    assert Base(tmp_path).tokenizer.settings.chat_template == ("one" if place == "tokenizer_config.json" else None)


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    tokenizer = build_plain()
    tokenizer.add_special_tokens([AddedToken("<extra>", special=True)])
    ours = TextTokenizer.from_folder(ModelFolder(save(tokenizer, tmp_path)))
    assert ours.encode_prompts(["a<extra>"])[0][-1] == tokenizer.token_to_id("<extra>")
