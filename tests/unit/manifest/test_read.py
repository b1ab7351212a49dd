"""Reading manifests: the shipped ones, the starter, defaults, and that nothing but ManifestError ever escapes."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soka_serve.errors import ManifestError
from soka_serve.manifest.docs import manifest_reference
from soka_serve.manifest.read import MAX_BYTES, parse_manifest, read_manifest
from soka_serve.manifest.rules import Adapt, RankBudget, RankEnergy, RankFixed, RankSpectrum
from soka_serve.manifest.schema import Manifest
from soka_serve.manifest.starter import starter_manifest
from tests.fuzzing.manifests import TOKENS, spoilt_manifests

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted((ROOT / "manifests").rglob("*.toml"))
EXPECTED = {"math", "gsm8k", "code", "extract", "llama3-8b-gqa", "smollm2-gsm8k"}
EXPECTED |= {f"llama2-7b-{x}" for x in ("gsm8k", "math", "mbpp")}


def test_what_ships() -> None:
    assert {read_manifest(path).manifest.name for path in SHIPPED} == EXPECTED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_manifests_say_how_to_run_them(path: Path) -> None:
    loaded = read_manifest(path)
    assert f"soka-serve build {path.relative_to(ROOT)}" in loaded.text.split("\nschema = 1")[0]
    assert loaded.manifest.description
    assert max(map(len, loaded.text.splitlines())) <= 120


def test_the_papers_setting() -> None:
    for name, completion, data in (
        ("gsm8k", "{{ response }}", "meta-math/MetaMathQA"),
        ("math", "{{ response }}", "meta-math/MetaMathQA"),
        ("mbpp", "{{ answer }}", "m-a-p/CodeFeedback-Filtered-Instruction"),
    ):
        manifest = read_manifest(ROOT / f"manifests/llama2-7b/{name}.toml").manifest
        (rule,) = manifest.adapt
        assert isinstance(rule.rank, RankBudget)
        assert rule.rank.parameters == 990_000
        assert (manifest.base.hub, manifest.train.data.hub) == ("meta-llama/Llama-2-7b-hf", data)
        assert manifest.train.batch_size * manifest.train.accumulate == 128
        assert manifest.train.data.completion == completion
        assert manifest.train.data.prompt is not None
        assert manifest.train.data.prompt.startswith("Below is an instruction")
        assert manifest.train.data.prompt.endswith("### Response:")


def test_where_a_manifest_came_from(tmp_path: Path) -> None:
    file = tmp_path / "sums.toml"
    raw = b'schema = 1\r\nbase.builtin = "tiny"\r\ntrain.data.builtin = "math"\r\n'
    file.write_bytes(raw)
    loaded = read_manifest(file)
    assert (loaded.manifest.name, loaded.path, loaded.directory) == ("sums", file, tmp_path)
    assert loaded.sha256 == hashlib.sha256(raw).hexdigest()
    assert loaded.text.encode() == raw


def test_defaults() -> None:
    manifest = parse_manifest('schema = 1\nbase.builtin = "tiny"\ntrain.data.builtin = "math"\n', "m.toml")
    assert manifest.adapt == (Adapt(),)
    assert manifest.adapt[0].rank == RankFixed(policy="fixed", rank=1)
    assert manifest.name is None
    assert manifest.output.write == ("adapter",)


def test_rules_remember_which_keys_they_set() -> None:
    text = """\
schema = 1
base.builtin = "tiny"
train.data.builtin = "math"
[[adapt]]
rank = { policy = "energy", threshold = 1 }
[[adapt]]
modules = ["q_proj"]
layers = [0, 2]
shape = [2, 4, 8, 16]
"""
    first, second = parse_manifest(text, "m.toml").adapt
    assert first.rank == RankEnergy(policy="energy", threshold=1.0)
    assert first.model_fields_set == {"rank"}
    assert second.model_fields_set == {"modules", "layers", "shape"}
    assert (second.layers, second.shape) == ((0, 2), (2, 4, 8, 16))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_dumped_manifest_reads_back(path: Path) -> None:
    manifest = read_manifest(path).manifest
    assert Manifest.model_validate(manifest.model_dump(by_alias=True)) == manifest


def test_manifests_are_frozen() -> None:
    manifest = read_manifest(ROOT / "manifests/math.toml").manifest
    with pytest.raises(ValueError, match="frozen"):
        manifest.train.steps = 3  # type: ignore[misc]


def test_the_starter_builds_as_it_is() -> None:
    text = starter_manifest("mine")
    manifest = parse_manifest(text, "mine.toml")
    assert (manifest.name, manifest.base.builtin, manifest.train.data.builtin) == ("mine", "tiny", "math")
    assert manifest.output.write == ("adapter", "merged")
    assert max(map(len, text.splitlines())) <= 120


def test_what_the_starter_comments_out_is_valid_too() -> None:
    lines = starter_manifest("mine").splitlines()
    commented = [i for i, line in enumerate(lines) if re.match(r"# [a-z_]+ = ", line)]
    assert len(commented) > 25
    for i in commented:
        key = lines[i][2:].split(" = ")[0]
        table = max(j for j in range(i) if lines[j].startswith("["))
        # Uncommenting a line replaces the same key, and the other kinds of source or length.
        rivals = {
            key,
            *{"path": ["builtin"], "hub": ["builtin"], "jsonl": ["builtin"], "epochs": ["steps"]}.get(key, ()),
        }
        end = next((j for j in range(table + 1, len(lines)) if lines[j].startswith("[")), len(lines))
        text = "\n".join(
            lines[i][2:] if j == i else "" if table < j < end and line.split(" = ")[0] in rivals else line
            for j, line in enumerate(lines)
        )
        try:
            parse_manifest(text, "mine.toml")
        except ManifestError as error:
            said = [p.message for p in error.problems]
            assert all("belongs to hub" in m or "does not go with builtin" in m for m in said), (lines[i], said)


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 101])
def test_the_starter_refuses_names_that_cannot_name_a_build(name: str) -> None:
    with pytest.raises(ManifestError, match="begins with a letter or digit"):
        starter_manifest(name)


def test_the_committed_reference_is_current() -> None:
    committed = (ROOT / "docs/manifest.md").read_text(encoding="utf-8")
    assert committed == manifest_reference(), "run: python -m soka_serve.manifest.docs"


def test_the_reference_names_every_key() -> None:
    text = manifest_reference()
    for table in (Manifest, *(field.annotation for field in Manifest.model_fields.values())):
        for name, field in getattr(table, "model_fields", {}).items():
            assert f"| `{field.alias or name}` |" in text
            assert field.description


def _check_errors(text: str) -> None:
    """Reading gives a manifest or a ManifestError whose problems stand inside the text."""
    raised: ManifestError | None = None
    try:
        parse_manifest(text, "m.toml")
    except ManifestError as error:
        raised = error
    if raised is None:
        return
    lines = text.split("\n")
    assert raised.problems
    assert str(raised)
    for problem in raised.problems:
        assert 0 <= problem.line <= len(lines)
        assert problem.message
        if problem.line:
            assert 1 <= problem.column <= len(lines[problem.line - 1]) + 1


@settings(max_examples=300)
@given(st.one_of(st.lists(TOKENS, max_size=40).map("".join), st.text(max_size=60)))
def test_any_text_gives_a_manifest_or_a_located_error(text: str) -> None:
    _check_errors(text)


@settings(max_examples=300, deadline=None)
@given(spoilt_manifests())
def test_any_mutation_of_a_manifest_gives_a_manifest_or_a_located_error(text: str) -> None:
    _check_errors(text)


def test_spectrum_bounds_are_the_papers_criteria() -> None:
    rank = RankSpectrum(policy="spectrum", min=2, max=4)
    assert (rank.threshold, rank.combine) == (0.5, "min")


# -------------------------------------------------------------------------------- files that are no manifests


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/stdin", "pipe"])
def test_pipes_and_devices(tmp_path: Path, place: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    code = f"from soka_serve.manifest.read import read_manifest\nread_manifest({str(tmp_path / place)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], input="schema = 1", capture_output=True, text=True, timeout=60, check=False
    )
    assert "not a file but a device, a pipe or a socket" in done.stderr


@pytest.mark.parametrize("size", [MAX_BYTES + 1, 1 << 40])
def test_giant_files(tmp_path: Path, size: int) -> None:
    """The second is a hole."""
    (tmp_path / "m.toml").write_text("schema = 1\n")
    os.truncate(tmp_path / "m.toml", size)
    with pytest.raises(ManifestError, match=f"has {size:,} bytes; at most 262,144 are read"):
        read_manifest(tmp_path / "m.toml")


_PARTS = ".".join("a" for _ in range(100_000))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"schema = 1\n{_PARTS} = 1\n", r"m.toml:2:1: has a key of more than 32 parts"),
        (f"schema = 1\n[{_PARTS}]\n", r"m.toml:2:1: has a key of more than 32 parts"),
        (f"schema = 1\na = {{ {_PARTS} = 1 }}\n", r"m.toml:2:1: has a key of more than 32 parts"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "{ a = " * 30_000, "nested too deeply"),
        ("schema = 1\n" + "".join(f"a{i} = 1\n" for i in range(20_000)), "and 19,9.. more problems"),
    ],
    ids=["key", "header", "inline", "arrays", "tables", "many keys"],
)
def test_keys_and_brackets_without_an_end(text: str, message: str) -> None:
    """They took 51 s, and then all memory."""
    began = time.process_time()
    with pytest.raises(ManifestError, match=message):
        parse_manifest(text, "m.toml")
    assert time.process_time() - began < 5


@pytest.mark.parametrize("digits", [16, 300, 6000])
@pytest.mark.parametrize("line", ["schema = N", "schema = 1\n[train]\nbatch_size = N", "schema = 1\nx = [{ a = N }]"])
def test_numbers_beyond_toml(line: str, digits: int) -> None:
    with pytest.raises(ManifestError, match=r"m\.toml:\d.*expected a whole number of at most 64 bits"):
        parse_manifest(line.replace("N", "0x" + "f" * digits) + "\n", "m.toml")


def test_many_numbers_beyond_toml() -> None:
    with pytest.raises(ManifestError, match="and 4,990 more problems"):
        parse_manifest(f"schema = 1\nx = [{', '.join(['-' + '9' * 20] * 5000)}]", "m.toml")
