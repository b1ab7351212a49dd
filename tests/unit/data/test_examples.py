"""Training data: loading, rendering, masking, packing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from soka_serve.base.tokenizer import TextTokenizer, TokenizerSettings
from soka_serve.builtin.tasks import generate
from soka_serve.data.encode import MASKED, EncodedExample, encode_examples, pack_examples
from soka_serve.data.examples import DataReader, Example
from soka_serve.data.rows import UnreachableDataError
from soka_serve.data.sources import count_examples, data_sha256
from soka_serve.errors import DataError
from soka_serve.manifest.schema import Data
from soka_serve.manifest.templates import RowTemplate

GSM8K = {"prompt": "Question: {{ question }}\nAnswer:", "completion": " {{ answer }}"}


def word_tokenizer() -> TextTokenizer:
    """A token per word and white-space character: lengths are countable by eye."""
    words = ["<s>", "</s>", "a", "b", "c", "d", " ", "x", "\n", "<unk>"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.add_special_tokens(["<s>", "</s>"])
    return TextTokenizer(backend, TokenizerSettings("words", {"bos_token": "<s>", "eos_token": "</s>"}))


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(tmp_path: Path, part: str = "train", **keys: Any) -> list[Example]:
    options, more = (
        {k: keys.pop(k) for k in names if k in keys} for names in (("seed", "tokenizer"), ("limit", "stream"))
    )
    return DataReader(Data.model_validate(keys), tmp_path, **options).examples(part, **more)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- builtin


def test_builtin_examples_are_the_generator_s(tmp_path: Path) -> None:
    problems = generate("math", "train", 5)
    examples = load(tmp_path, builtin="math", limit=5)
    assert [(e.prompt, e.completion) for e in examples] == [(p.prompt, p.completion) for p in problems]


def test_builtin_evaluation_is_the_held_out_split(tmp_path: Path) -> None:
    train = {e.prompt for e in load(tmp_path, builtin="math")}
    held_out = {e.prompt for e in load(tmp_path, "eval", builtin="math", limit=50)}
    assert len(held_out) == 50
    assert not train & held_out


def test_the_seed_does_not_choose_builtin_problems(tmp_path: Path) -> None:
    assert load(tmp_path, builtin="code", limit=9) == load(tmp_path, builtin="code", limit=9, seed=7)


def test_builtin_through_a_template(tmp_path: Path) -> None:
    first = load(tmp_path, builtin="math", prompt="<{{ prompt }}>", completion="{{ answer }}", limit=1)[0]
    assert first == Example(f"<{generate('math', 'train', 1)[0].prompt}>", generate("math", "train", 1)[0].answer)


# ---------------------------------------------------------------------------------------------------------- jsonl


def test_gsm8k(shared_data: Path) -> None:
    examples = load(shared_data, jsonl="gsm8k_train.jsonl", **GSM8K)
    assert len(examples) == 7473
    assert examples[0].prompt.startswith("Question: Natalia sold clips")
    assert examples[0].prompt.endswith("\nAnswer:")
    assert all("#### " in e.completion for e in examples)


def test_templates_keep_every_character(tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", [{"prompt": "<b> & é\u2028\n", "completion": "  x\n"}])
    assert load(tmp_path, jsonl="d.jsonl") == [Example("<b> & é\u2028\n", "  x\n")]
    kept = load(tmp_path, jsonl="d.jsonl", prompt="{{ prompt }}\n\n", completion="{{ completion }}")
    assert kept[0].prompt == "<b> & é\u2028\n\n\n"


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    row = b'{"prompt": "a", "completion": "b"}'
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\n  \n" + row)
    data = Data(jsonl="d.jsonl")
    assert load(tmp_path, jsonl="d.jsonl") == [Example("a", "b")] * 2
    assert count_examples(data, manifest_dir=tmp_path) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "d.jsonl: empty"),
        (b"\n \n", "d.jsonl: empty"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', r"d.jsonl:2:\d+: malformed JSON"),
        (rb'{"prompt": "a", "completion": "cut \ud83d"}', r"d.jsonl:1: \\ud83d is half of a character"),
        (rb'{"prompt": "a", "x": [{"y": "\udE00"}]}', r"d.jsonl:1: \\ude00 is half of a character"),
        (rb'{"\ud83dprompt": "a", "completion": "b"}', r"d.jsonl:1: \\ud83d is half of a character"),
        (b'\n[1]\n"x"\n', r"(?s)d.jsonl:2: expected a JSON object, got list.*d.jsonl:3: .* got str"),
        (b'{"prompt": "caf\xe9"}\n', r"d.jsonl:1: not UTF-8 \(byte 0xe9 at column 16\)"),
        ('{"prompt": "a"}'.encode("utf-16"), "d.jsonl:1: UTF-16"),
        (b"{\n" * 9, r"(?s)d.jsonl:5.*and 4 more lines"),
    ],
)
def test_malformed_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path, jsonl="d.jsonl")


def test_missing_file_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(UnreachableDataError, match=r"none\.jsonl: not found"):
        load(tmp_path, jsonl="none.jsonl")


def test_directory_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path, jsonl=".")


def test_missing_columns_are_named_with_those_there_are(tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", [{"question": "a", "answer": "b"}, {"question": "a"}])
    with pytest.raises(DataError) as caught:
        load(tmp_path, jsonl="d.jsonl", prompt="{{ qestion }}", completion="{{ solution }} {{ x }}")
    message = caught.value.message
    assert "d.jsonl:1: train.data.prompt names column 'qestion'" in message
    assert "train.data.completion names columns 'solution', 'x'" in message
    assert "it has columns 'answer', 'question'" in message
    assert "id you mean 'question' for 'qestion'?" in str(caught.value.hint)
    with pytest.raises(DataError, match=r"d\.jsonl:2: train\.data\.completion names column 'answer'"):
        load(tmp_path, jsonl="d.jsonl", prompt="{{ question }}", completion="{{ answer }}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ a }}", "column 'a' is null"),
        ("{{ b.c }}", "has no attribute 'c'"),
        ("{{ b + 1 }}", "the template fails: TypeError"),
        ("{{ ''.__class__.__mro__ }}", "(unsafe|the template fails)"),
    ],
)
def test_templates_that_fail(tmp_path: Path, template: str, message: str) -> None:
    write_rows(tmp_path / "d.jsonl", [{"a": None, "b": "t", "completion": "c"}])
    with pytest.raises(DataError, match=message):
        load(tmp_path, jsonl="d.jsonl", prompt=template)


def test_template_that_does_not_parse() -> None:
    with pytest.raises(DataError, match=r"train\.data\.prompt: template line 2"):
        RowTemplate("x\n{% if %}", "train.data.prompt")


def test_optional_columns_in_a_template(tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", [{"q": "a", "i": None}, {"q": "b", "i": "!"}, {"q": "c"}])
    template = "{{ q }}{% if i is defined %}{{ i or '' }}{% endif %}"
    assert [e.prompt for e in load(tmp_path, jsonl="d.jsonl", prompt=template, completion="x")] == ["a", "b!", "c"]


def test_limits(tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", [{"prompt": str(i), "completion": "x"} for i in range(10)])
    assert [e.prompt for e in load(tmp_path, jsonl="d.jsonl", limit=3)] == ["0", "1", "2"]
    data = Data(jsonl="d.jsonl", limit=4)
    assert len(DataReader(data, tmp_path).examples("train")) == 4
    assert len(DataReader(data, tmp_path).examples("train", limit=2)) == 2
    assert count_examples(data, manifest_dir=tmp_path) == 4


def test_evaluation_examples(tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", [{"prompt": str(i), "completion": "x"} for i in range(10)])
    write_rows(tmp_path / "e.jsonl", [{"prompt": "e", "completion": "x"}])
    assert load(tmp_path, "eval", jsonl="d.jsonl") == []
    assert load(tmp_path, "eval", jsonl="d.jsonl", eval_jsonl="e.jsonl") == [Example("e", "x")]
    parts = [[e.prompt for e in load(tmp_path, p, jsonl="d.jsonl", eval_frac=0.3, seed=1)] for p in ("train", "eval")]
    assert len(parts[1]) == 3
    assert sorted(parts[0] + parts[1]) == [str(i) for i in range(10)]
    other = [e.prompt for e in load(tmp_path, "eval", jsonl="d.jsonl", eval_frac=0.3, seed=2)]
    assert other != parts[1]
    assert len(load(tmp_path, "eval", jsonl="d.jsonl", eval_frac=0.001)) == 1


def test_one_example_cannot_be_split(tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "x"}])
    with pytest.raises(DataError, match="cannot be split"):
        load(tmp_path, jsonl="d.jsonl", eval_frac=0.5)


# ------------------------------------------------------------------------------------------------------------ hub


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local dataset directory in the hub's layout, with a train and a test split."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "sets"
    (folder / "data").mkdir(parents=True)
    write_rows(folder / "data" / "train.jsonl", [{"question": f"q{i}", "answer": f"a{i}"} for i in range(6)])
    write_rows(folder / "data" / "test.jsonl", [{"question": "t", "answer": "u"}])
    return folder


def test_hub_dataset_from_a_directory(tmp_path: Path, dataset: Path) -> None:
    keys = {"hub": dataset.name, "prompt": "{{ question }}", "completion": "{{ answer }}"}
    assert load(tmp_path, **keys) == [Example(f"q{i}", f"a{i}") for i in range(6)]
    assert load(tmp_path, **keys, stream=True, limit=2) == [Example("q0", "a0"), Example("q1", "a1")]
    assert load(tmp_path, "eval", **keys, eval_split="test") == [Example("t", "u")]
    assert len(load(tmp_path, "eval", **keys, eval_frac=0.5)) == 3
    assert count_examples(Data.model_validate(keys), manifest_dir=tmp_path) is None


def test_hub_split_that_is_not_there(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(DataError, match="split 'dev'") as caught:
        load(tmp_path, hub=dataset.name, split="dev")
    assert "train.data.split" in str(caught.value.hint)


def test_hub_column_that_is_not_there(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(DataError, match=r"sets\[train\]\[0\]: .*column 'prompt'.*'answer', 'question'"):
        load(tmp_path, hub=dataset.name)


def test_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    with pytest.raises(UnreachableDataError, match="nobody/nothing") as caught:
        load(tmp_path, hub="nobody/nothing")
    assert "local directory" in str(caught.value.hint)


# ---------------------------------------------------------------------------------------------------- encode, mask


def encode(examples: list[Example], max_length: int = 100, overlong: Any = "drop", completion_only: bool = True) -> Any:
    rules = SimpleNamespace(max_length=max_length, overlong=overlong, completion_only=completion_only)
    return encode_examples(examples, word_tokenizer(), rules)


def test_prompt_is_masked_and_eos_appended() -> None:
    found = encode([Example("a b", " c")])
    assert found.examples == [EncodedExample([0, 2, 6, 3, 6, 4, 1], [MASKED] * 4 + [6, 4, 1])]
    assert (found.tokens, found.trained_tokens, found.longest) == (7, 3, 7)


def test_whole_text_loss() -> None:
    assert encode([Example("a", "b")], completion_only=False).examples == [EncodedExample([0, 2, 3, 1], [0, 2, 3, 1])]


def test_eos_is_not_doubled() -> None:
    assert encode([Example("a", "b</s>")]).examples[0].input_ids == [0, 2, 3, 1]


def test_overlong_examples_are_dropped_or_cut() -> None:
    examples = [Example("a", "b"), Example("a", "bcd"), Example("abcd", "b")]
    dropped = encode(examples, 4)
    assert (len(dropped.examples), dropped.total, dropped.dropped, dropped.truncated) == (1, 3, 2, 0)
    cut = encode(examples, 4, "truncate")
    # The third keeps no trained token, so nothing of it can be learned.
    assert (len(cut.examples), cut.dropped, cut.truncated, cut.longest) == (2, 1, 1, 7)
    assert cut.examples[1] == EncodedExample([0, 2, 3, 4], [MASKED, MASKED, 3, 4])


def test_everything_too_long() -> None:
    with pytest.raises(DataError, match=r"all 2 examples are longer than max_length = 3 tokens \(the longest has 6\)"):
        encode([Example("a", "bc"), Example("a", "bcd")], 3)


def test_order_is_kept_across_chunks() -> None:
    letters = "abcd"
    examples = [Example(letters[i % 4], "x", templated=i % 3 == 0) for i in range(1200)]
    found = encode(examples).examples
    assert [e.input_ids[-3] for e in found] == [2 + i % 4 for i in range(1200)]
    assert [e.input_ids[0] == 0 for e in found] == [i % 3 != 0 for i in range(1200)]


# -------------------------------------------------------------------------------------------------------- packing


def test_first_fit_by_hand() -> None:
    def example(length: int, mark: int) -> EncodedExample:
        return EncodedExample([mark] * length, [mark] * length)

    rows = pack_examples([example(6, 1), example(7, 2), example(4, 3), example(3, 4), example(10, 5)], 10)
    assert [r.input_ids for r in rows] == [[1] * 6 + [3] * 4, [2] * 7 + [4] * 3, [5] * 10]
    assert rows[0].position_ids == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert rows[0].labels == [MASKED, *[1] * 5, MASKED, *[3] * 3]


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="11 tokens does not fit rows of 10"):
        pack_examples([EncodedExample([0] * 11, [0] * 11)], 10)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_is_first_fit_and_loses_nothing(lengths: list[int]) -> None:
    encoded = [EncodedExample([i] * n, [i] * n) for i, n in enumerate(lengths)]
    rows = pack_examples(encoded, 20)
    expected: list[list[int]] = []
    for index, length in enumerate(lengths):  # the obvious quadratic way
        row = next((r for r in expected if sum(lengths[i] for i in r) + length <= 20), None)
        if row is None:
            expected.append(row := [])
        row.append(index)
    assert [r.input_ids for r in rows] == [[i for i in row for _ in range(lengths[i])] for row in expected]
    for row in rows:
        assert len(row.input_ids) == len(row.labels) == len(row.position_ids) <= 20
        assert all(row.labels[i] == MASKED for i, p in enumerate(row.position_ids) if p == 0)


# ------------------------------------------------------------------------------------------------------------ hash


def test_hash_follows_what_the_examples_are_made_from(tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}])
    write_rows(tmp_path / "same.jsonl", [{"prompt": "a", "completion": "b"}])

    def digest(**keys: Any) -> str:
        return data_sha256(Data.model_validate(keys), manifest_dir=tmp_path)

    first = digest(jsonl="d.jsonl")
    assert first == digest(jsonl="d.jsonl")
    others = {digest(jsonl="d.jsonl", prompt="{{ prompt }}!"), digest(jsonl="d.jsonl", limit=1)}
    others |= {digest(builtin="math"), digest(builtin="code"), digest(hub="x/y"), digest(hub="x/y", revision="1")}
    assert len(others) == 6
    assert first not in others
    write_rows(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "c"}])
    assert digest(jsonl="d.jsonl") != first
    with pytest.raises(DataError, match="not found"):
        digest(jsonl="none.jsonl")


def test_hash_without_the_evaluation_set(tmp_path: Path) -> None:
    for name in ("d", "e"):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": "b"}])
    alone, *evaluated = (
        Data.model_validate({"jsonl": "d.jsonl", **more})
        for more in ({}, {"eval_jsonl": "e.jsonl"}, {"eval_jsonl": "d.jsonl"})
    )
    expected = data_sha256(alone, manifest_dir=tmp_path)
    assert {data_sha256(data, manifest_dir=tmp_path, evaluation=False) for data in (alone, *evaluated)} == {expected}
    assert len({data_sha256(data, manifest_dir=tmp_path) for data in (alone, *evaluated)}) == 3


def test_hash_does_not_follow_the_place(tmp_path: Path, dataset: Path) -> None:
    write_rows(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}])
    (tmp_path / "moved").mkdir()
    for one, other in (
        (Data(jsonl="d.jsonl"), Data(jsonl="moved/e.jsonl")),
        (Data(jsonl="d.jsonl", eval_jsonl="d.jsonl"), Data(jsonl="d.jsonl", eval_jsonl="moved/e.jsonl")),
        (Data(hub=dataset.name), Data(hub=f"moved/{dataset.name}")),
    ):
        before = data_sha256(one, manifest_dir=tmp_path)
        shutil.copy(tmp_path / "d.jsonl", tmp_path / "moved/e.jsonl")
        shutil.copytree(dataset, tmp_path / "moved" / dataset.name, dirs_exist_ok=True)
        assert data_sha256(other, manifest_dir=tmp_path) == before


def test_hash_of_a_local_dataset_directory(tmp_path: Path, dataset: Path) -> None:
    data = Data(hub=dataset.name)
    before = data_sha256(data, manifest_dir=tmp_path)
    write_rows(dataset / "data" / "test.jsonl", [{"question": "new", "answer": "u"}])
    assert data_sha256(data, manifest_dir=tmp_path) != before
