"""Several datasets in one manifest: proportions, what an epoch holds, and errors that name the dataset."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from fractions import Fraction
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soka_serve.compiler.check import choose_questions
from soka_serve.compiler.context import Context, prepare
from soka_serve.compiler.plan.text import render_plan
from soka_serve.compiler.stages import encode
from soka_serve.compiler.status import plan
from soka_serve.data.encode import EncodedExample, EncodedSet
from soka_serve.data.mixture import mix, mix_encoded, mixture_counts
from soka_serve.errors import DataError, ManifestError
from soka_serve.evaluation.tasks import default_tasks
from soka_serve.io.workspace import Workspace
from soka_serve.manifest.read import json_schema, read_manifest
from soka_serve.manifest.schema import Manifest

HEAD = 'schema = 1\n[base]\nbuiltin = "tiny"\n[[adapt]]\ncalibration_batches = 0\n[train]\nmax_length = 40\n'


def write_rows(file: Path, letter: str, count: int, *, long: int = 0) -> str:
    """So many rows, of which the first `long` are too long for `HEAD`."""
    rows = [{"prompt": f"{letter} {i}" * (60 if i < long else 1), "completion": f" {i}"} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file.name


def write_manifest(folder: Path, *entries: str) -> Path:
    file = folder / "m.toml"
    file.write_text(HEAD + "".join(f"[[train.data]]\n{entry}\n" for entry in entries))
    return file


def context_of(file: Path) -> Context:
    return prepare(read_manifest(file), Workspace(file.parent / "build", "m"), progress=False)


def letters(context: Context) -> list[str]:
    """Of an epoch's examples, in order: which dataset each is from."""
    tokenizer = context.base.tokenizer
    return [tokenizer.decode(e.input_ids).removeprefix("<s>")[0] for e in encode(context)[0].examples]


# ------------------------------------------------------------------------------------------------------ proportions


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 50)), min_size=1, max_size=5))
def test_counts_are_the_shares_of_the_longest_epoch_without_repeats(pairs: list[tuple[int, int]]) -> None:
    sizes, weights = [size for size, _ in pairs], [weight / 10 for _, weight in pairs]
    counts, total = mixture_counts(sizes, weights), sum(weight for _, weight in pairs)
    shares = [Fraction(weight, total) for _, weight in pairs]
    assert all(count <= size for count, size in zip(counts, sizes, strict=True))
    assert all(abs(c - s * sum(counts)) < 1 for c, s in zip(counts, shares, strict=True))
    longer = sum(counts) + 1
    assert any(share * longer > size for share, size in zip(shares, sizes, strict=True))


def test_an_epoch_is_spread_evenly_seeded_and_has_no_example_twice() -> None:
    parts = [[f"a{i}" for i in range(100)], [f"b{i}" for i in range(1000)], [f"c{i}" for i in range(50)]]
    epoch = mix(parts, [0.5, 0.4, 0.1], seed=3)
    assert Counter(e[0] for e in epoch) == {"a": 100, "b": 80, "c": 20}
    assert len(set(epoch)) == 200
    for end in (20, 50, 110):
        found = Counter(e[0] for e in epoch[:end])
        assert all(abs(found[k] - end * share) <= 1.5 for k, share in (("a", 0.5), ("b", 0.4), ("c", 0.1)))
    assert epoch == mix(parts, [0.5, 0.4, 0.1], seed=3)
    other = mix(parts, [0.5, 0.4, 0.1], seed=4)
    assert [e for e in other if e[0] == "a"] == parts[0]
    assert {e for e in other if e[0] == "b"} != {e for e in epoch if e[0] == "b"}
    assert mix(parts[:1], None, seed=3) == parts[0]
    assert Counter(mix(parts, None, seed=0)) == Counter(e for part in parts for e in part)


def test_a_weight_that_gives_nothing_is_refused() -> None:
    sets = [EncodedSet([EncodedExample([1], [1])] * n, n, 0, 0) for n in (3, 900)]
    with pytest.raises(DataError, match=r"train\.data\[0\]: its weight gives it none of the mixture's examples"):
        mix_encoded(sets, [0.0001, 1.0], 0)


def test_a_build_trains_on_exact_shares_of_what_is_not_too_long(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", "a", 50, long=20)
    b = write_rows(tmp_path / "b.jsonl", "b", 200)
    file = write_manifest(tmp_path, f'jsonl = "{a}"\nweight = 3', f'jsonl = "{b}"\nweight = 1')
    context = context_of(file)
    assert Counter(letters(context)) == {"a": 30, "b": 10}
    assert letters(context) == letters(context_of(file))
    made = plan(file, out=tmp_path / "build")
    assert [(p.source, p.examples, p.used) for p in made.data.parts] == [("a.jsonl", 30, 30), ("b.jsonl", 200, 10)]
    assert (made.data.examples, made.data.rows, made.data.dropped) == (250, 40, 20)
    assert made.to_json()["data"]["parts"][1] == {"source": "b.jsonl", "examples": 200, "used": 10}
    text = render_plan(made, color=False)
    assert "75.0% of an epoch: 30 of 30 of a.jsonl" in text
    assert "25.0% of an epoch: 10 of 200 of b.jsonl" in text
    whole = write_manifest(tmp_path, f'jsonl = "{a}"', f'jsonl = "{b}"')
    assert Counter(letters(context_of(whole))) == {"a": 30, "b": 200}


def test_weights_files_and_order_count_in_the_keys_and_places_do_not(tmp_path: Path) -> None:
    a, b = (write_rows(tmp_path / f"{x}.jsonl", x, 20) for x in "ab")
    entries = [f'jsonl = "{a}"\nweight = 1', f'jsonl = "{b}"\nweight = 1']
    before = context_of(write_manifest(tmp_path, *entries)).keys
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    moved = context_of(write_manifest(tmp_path, entries[0].replace("a.jsonl", "moved.jsonl"), entries[1])).keys
    assert moved["tune"] == before["tune"]
    for changed in ([entries[0], entries[1].replace("weight = 1", "weight = 2")], entries[::-1]):
        assert context_of(write_manifest(tmp_path, *changed)).keys["tune"] != before["tune"]
    write_rows(tmp_path / "b.jsonl", "b", 21)
    assert context_of(write_manifest(tmp_path, *entries)).keys["tune"] != before["tune"]


def test_evaluation_sets_are_joined_and_the_first_with_problems_is_asked(tmp_path: Path) -> None:
    a, b, e = (write_rows(tmp_path / f"{x}.jsonl", x, 20) for x in "abe")
    file = write_manifest(
        tmp_path, f'jsonl = "{a}"', f'jsonl = "{b}"\neval_frac = 0.25', f'jsonl = "{a}"\neval_jsonl = "{e}"'
    )
    file.write_text(file.read_text().replace("max_length = 40", "max_length = 40\neval_every = 5"))
    context = context_of(file)
    held_out = encode(context)[1]
    assert held_out is not None
    found = Counter(context.base.tokenizer.decode(x.input_ids).removeprefix("<s>")[0] for x in held_out.examples)
    assert found == {"b": 5, "e": 20}
    questions = choose_questions(context.loaded.manifest, tmp_path, context.base.tokenizer)
    assert questions is not None
    assert {prompt[0] for prompt in questions.prompts} == {"b"}
    both = read_manifest(write_manifest(tmp_path, 'builtin = "math"', 'builtin = "code-easy"', 'builtin = "math-easy"'))
    assert default_tasks(both.manifest) == ("soka_builtin_math", "soka_builtin_code")


# ---------------------------------------------------------------------------------------------------------- errors


def test_errors_name_the_dataset(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", "a", 4)
    with pytest.raises(DataError, match=r"train\.data\[1\]: .*nowhere\.jsonl: not found"):
        context_of(write_manifest(tmp_path, f'jsonl = "{a}"', 'jsonl = "nowhere.jsonl"'))
    context = context_of(write_manifest(tmp_path, f'jsonl = "{a}"', f'jsonl = "{a}"\nprompt = "{{{{ question }}}}"'))
    with pytest.raises(DataError, match=r"train\.data\[1\]: a\.jsonl:1: .*question"):
        encode(context)
    b = write_rows(tmp_path / "b.jsonl", "b", 3, long=3)
    with pytest.raises(DataError, match=r"train\.data\[1\]: train: all 3 examples are longer than max_length = 40"):
        encode(context_of(write_manifest(tmp_path, f'jsonl = "{a}"', f'jsonl = "{b}"')))


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        (['builtin = "math"\nweight = 1', 'builtin = "code"'], "m.toml:11:1: train.data[1]: weight is missing"),
        (['builtin = "math"\nweight = 0'], "m.toml:10:10: train.data[0].weight: expected a number, above 0; got 0"),
        (['builtin = "math"', 'jsnl = "x"'], "m.toml:10:1: train.data[1]: expected one of builtin, jsonl, hub"),
        (['builtin = "math"', 'jsnl = "x"'], "m.toml:11:1: train.data[1].jsnl: unknown key (did you mean 'jsonl'?)"),
        (['jsonl = "x"\nsplit = "test"'], "m.toml:10:1: train.data[0].split: split belongs to hub"),
    ],
)
def test_what_is_wrong_stands_with_line_and_column(tmp_path: Path, entries: list[str], problem: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read_manifest(write_manifest(tmp_path, *entries))
    assert problem in caught.value.message


def test_a_single_table_takes_no_weight_and_a_list_is_not_empty(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.write_text(HEAD + '[train.data]\nbuiltin = "math"\nweight = 1\n')
    with pytest.raises(
        ManifestError, match=r"10:1: train\.data\.weight: unknown key \(weight belongs in \[\[train\.data"
    ):
        read_manifest(file)
    for data, words in (("[]", "at least 1"), ("3", "expected a table; got 3")):
        file.write_text(HEAD + f"data = {data}\n")
        with pytest.raises(ManifestError, match=words):
            read_manifest(file)


def test_editors_and_dumps_take_both_forms() -> None:
    check = jsonschema.Draft7Validator(json_schema())
    table = tomllib.loads(HEAD + '[train.data]\nbuiltin = "math"\n')
    mixed = tomllib.loads(
        HEAD + '[[train.data]]\nbuiltin = "math"\nweight = 1\n[[train.data]]\njsonl = "x"\nweight = 0.5\n'
    )
    for tables in (table, mixed):
        check.validate(tables)
        manifest = Manifest.model_validate(tables)
        dumped = manifest.model_dump(mode="json", by_alias=True, exclude_none=True)
        assert Manifest.model_validate(dumped) == manifest
    for data in ([], [{"builtin": "mth"}], {"builtin": "math", "weight": 1}, [{"jsonl": "x", "weight": 0}]):
        assert not check.is_valid({**table, "train": {"data": data}})
