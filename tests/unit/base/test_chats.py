"""Chat messages rendered by the base's template: what is the prompt, and what the completion."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from soka_serve.base.tokenizer import TextTokenizer, TokenizerSettings
from soka_serve.data.encode import encode_examples
from soka_serve.data.examples import DataReader
from soka_serve.errors import DataError
from soka_serve.manifest.schema import Data
from tests.unit.base.test_tokenizer import BRACKETS, CHATML, CHATS, build_llama3


def chat_rows(tmp_path: Path, *rows: Any) -> Data:
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(jsonl="chat.jsonl", messages="messages")


def chat_tokenizer(template: Any, eos: str = "</s>") -> TextTokenizer:
    return TextTokenizer(build_llama3(), TokenizerSettings("test", {"bos_token": "<s>", "eos_token": eos}, template))


@pytest.mark.parametrize(("template", "eos"), [(BRACKETS, "</s>"), (CHATML, "<|im_end|>")])
def test_the_last_assistant_message_is_the_completion(tmp_path: Path, template: str, eos: str) -> None:
    data = chat_rows(tmp_path, {"messages": [*CHATS["two turns"], {"role": "user", "content": "unanswered"}]})
    tokenizer = chat_tokenizer(template, eos)
    (example,) = DataReader(data, tmp_path, tokenizer=tokenizer).examples("train")
    assert example.templated
    rendered = tokenizer.render_many([(CHATS["two turns"][:3], True), (CHATS["two turns"], False)])
    assert [example.prompt, example.prompt + example.completion] == rendered
    assert "g" in example.completion
    assert "unanswered" not in example.prompt + example.completion
    rules = SimpleNamespace(max_length=999, overlong="drop", completion_only=True)
    encoded = encode_examples([example], tokenizer, rules).examples[0]
    # The template's own BOS and EOS, once each: none are added.
    whole = tokenizer.encode_prompts([example.prompt + example.completion], add_special_tokens=False)[0]
    assert encoded.input_ids == whole
    assert encoded.input_ids.count(tokenizer.eos_id) == (example.prompt + example.completion).count(eos)


def test_eos_is_added_where_the_template_has_none(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = chat_tokenizer(template + "{% if add_generation_prompt %}assistant: {% endif %}")
    data = chat_rows(tmp_path, {"messages": CHATS["one turn"]})
    (example,) = DataReader(data, tmp_path, tokenizer=tokenizer).examples("train")
    assert example.completion == "It is 5.\n"
    (pair,) = tokenizer.encode_pairs([(example.prompt, example.completion)], add_special_tokens=False)
    ids = pair.input_ids
    assert ids[-1] == tokenizer.eos_id


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chat": []}, r"chat\.jsonl:1: train\.data\.messages names column 'messages'.* it has chat"),
        ({"messages": "x"}, "expected a list of objects"),
        ({"messages": [{"role": "user"}]}, "expected a list of objects"),
        ({"messages": []}, "no assistant message"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no assistant message after another one"),
        (
            {"messages": [{"role": "user", "content": "x"}] * 2 + [{"role": "assistant", "content": "y"}]},
            r"chat\.jsonl:1: messages: the chat template refuses the messages: roles must alternate",
        ),
    ],
)
def test_rows_that_are_no_chats(tmp_path: Path, row: Any, message: str) -> None:
    data = chat_rows(tmp_path, row)
    with pytest.raises(DataError, match=message):
        DataReader(data, tmp_path, tokenizer=chat_tokenizer(BRACKETS)).examples("train")


def test_chats_need_a_template_and_a_tokenizer(tmp_path: Path) -> None:
    data = chat_rows(tmp_path, {"messages": CHATS["one turn"]})
    for template in (None, 3):
        with pytest.raises(DataError, match="no chat template"):
            DataReader(data, tmp_path, tokenizer=chat_tokenizer(template)).examples("train")
    with pytest.raises(DataError, match="need the base's tokenizer"):
        DataReader(data, tmp_path).examples("train")


def test_template_that_rewrites_the_prompt(tmp_path: Path) -> None:
    data = chat_rows(tmp_path, {"messages": CHATS["one turn"]})
    tokenizer = chat_tokenizer("{{ messages | length }}{{ messages[-1].content }}")
    with pytest.raises(DataError, match="renders the conversation differently"):
        DataReader(data, tmp_path, tokenizer=tokenizer).examples("train")


def test_template_that_does_not_parse(tmp_path: Path) -> None:
    data = chat_rows(tmp_path, {"messages": CHATS["one turn"]})
    with pytest.raises(DataError, match="chat template, line 1"):
        DataReader(data, tmp_path, tokenizer=chat_tokenizer("{% for %}")).examples("train")
