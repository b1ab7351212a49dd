"""Bad manifests: every problem, with its key, place and words."""

from __future__ import annotations

from pathlib import Path

import pytest

from soka_serve.errors import ManifestError, ManifestProblem
from soka_serve.manifest.read import parse_manifest, read_manifest

GOOD = """\
schema = 1
[base]
builtin = "tiny"
[[adapt]]
[train]
steps = 10
[train.data]
builtin = "math"
[output]
"""


def problems_of(text: str) -> tuple[ManifestProblem, ...]:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text, "m.toml")
    return caught.value.problems


def with_line(table: str, line: str) -> tuple[str, int]:
    """GOOD with a line after a table's header ('' is the top), and the number of the line."""
    lines = GOOD.splitlines()
    at = lines.index(table) + 1 if table else 1
    return "\n".join([*lines[:at], line, *lines[at:]]) + "\n", at + 1


# table, line, key, column, fragments of the message and the hint
CASES = [
    # unknown keys
    ("", "nmae = 'x'", "nmae", 1, ["unknown key", "did you mean 'name'?"]),
    ("[base]", "build_in = 'x'", "base.build_in", 1, ["unknown key", "did you mean 'builtin'?"]),
    ("[base]", "trust_remote_code = true", "base.trust_remote_code", 1, ["never runs code"]),
    ("[train]", "lr = 0.1", "train.lr", 1, ["did you mean 'learning_rate'?"]),
    ("[train]", "jsonl = 'x'", "train.jsonl", 1, ["unknown key", "jsonl belongs in [train.data]"]),
    ("[train.data]", "steps = 3", "train.data.steps", 1, ["steps belongs in [train]"]),
    ("[train]", "qqqq = 3", "train.qqqq", 1, ["unknown key", "known here: method, method_rank"]),
    ("[train]", "prune.every = 3", "train.prune.threshold", 15, ["required, but missing", "above 0, below 1"]),
    ("[base]", "'a b' = 3", 'base."a b"', 1, ["unknown key"]),
    ("[output]", "description = 'x'", "output.description", 1, ["at the top of the file"]),
    # types, strictly
    ("[train]", 'batch_size = "8"', "train.batch_size", 14, ['whole number, at least 1; got "8"', "write 8 without"]),
    ("[train]", "batch_size = 8.0", "train.batch_size", 14, ["got 8.0", "write 8"]),
    ("[train]", "batch_size = true", "train.batch_size", 14, ["expected a whole number, at least 1; got true"]),
    ("[train]", "learning_rate = true", "train.learning_rate", 17, ["expected a number, above 0; got true"]),
    ("[train]", "packing = 1", "train.packing", 11, ["expected true or false; got 1"]),
    ("[train]", "packing = 'true'", "train.packing", 11, ["write true without quotes"]),
    ("", "description = 3", "description", 15, ["expected a string; got 3", 'write "3", in quotes']),
    ("[train]", "warmup_frac = 1979-05-27", "train.warmup_frac", 15, ["got 1979-05-27"]),
    ("", "serve = 3", "serve", 9, ["expected a table; got 3"]),
    ("", "serve = [{}]", "serve", 9, ["write [serve], with single brackets"]),
    ("[output]", 'write = "adapter"', "output.write", 9, ["expected an array of 'adapter' and", 'write ["adapter"]']),
    ("[adapt]", "", "adapt", 1, ["double brackets"]),
    # values
    ("[train]", "method = 'sokka'", "train.method", 10, ["expected 'soka', 'lora'", "did you mean 'soka'?"]),
    ("[base]", "dtype = 'BFloat16'", "base.dtype", 9, ["did you mean 'bfloat16'?"]),
    ("[output]", "write = ['adapter', 'mergd']", "output.write[1]", 21, ["did you mean 'merged'?"]),
    ("[output]", "write = []", "output.write", 9, ["at least 1; got []"]),
    ("[output]", "adapter_terms = 'traind'", "output.adapter_terms", 17, ["a share of", "did you mean 'trained'?"]),
    ("[output]", "adapter_terms = 0", "output.adapter_terms", 17, ["above 0, at most 1; got 0"]),
    ("[output]", "adapter_terms = true", "output.adapter_terms", 17, ["'all', 'trained', or a share", "got true"]),
    ("[train]", "batch_size = 0", "train.batch_size", 14, ["at least 1; got 0"]),
    ("[train]", "learning_rate = -1", "train.learning_rate", 17, ["above 0; got -1"]),
    ("[train]", "learning_rate = inf", "train.learning_rate", 17, ["got inf"]),
    ("[train]", "weight_decay = nan", "train.weight_decay", 16, ["got nan"]),
    ("[train]", "warmup_frac = 1", "train.warmup_frac", 15, ["at least 0, below 1; got 1"]),
    ("[train]", "seed = 4294967296", "train.seed", 8, ["below 4.29497e+09; got 4294967296"]),
    ("", "name = '../x'", "name", 8, ["begins with a letter or digit", '"../x"']),
    ("[train.data]", "prompt = '{{ a'", "train.data.prompt", 10, ["line 1 of the template", "unexpected end"]),
    ("[base]", 'revision = "a\\u0000b"', "base.revision", 1, ["belongs to hub"]),
    # rules
    ("[[adapt]]", "layers = '8-2'", "adapt[0].layers", 10, ["runs backwards: 8 is after 2"]),
    ("[[adapt]]", 'layers = "all\\n"', "adapt[0].layers", 10, ["'0-15', '4-', '-4-'"]),
    ("[[adapt]]", "scale = 1e308", "adapt[0].scale", 9, ["at most 1000"]),
    ("[[adapt]]", "layers = 'al'", "adapt[0].layers", 10, ["'0-15', '4-', '-4-'", 'got "al"']),
    ("[[adapt]]", "layers = [0, -1]", "adapt[0].layers", 10, ["list of layer numbers; got [0, -1]"]),
    ("[[adapt]]", "shape = [1, 2, 3]", "adapt[0].shape", 9, ["four whole numbers [m, n, p, q]", "[1, 2, 3]"]),
    ("[[adapt]]", "shape = 'ballanced'", "adapt[0].shape", 9, ["did you mean 'balanced'?"]),
    ("[[adapt]]", "init = 'nystrm'", "adapt[0].init", 8, ["expected 'weights', 'nystrom'", "did you mean 'nystrom'?"]),
    ("[[adapt]]", "right = 'dc'", "adapt[0].right", 9, ["expected 'trained' or 'dct'", "did you mean 'dct'?"]),
    ("[[adapt]]", "weighting = 'bth'", "adapt[0].weighting", 13, ["expected 'inputs' or 'both'", "mean 'both'?"]),
    (
        "[train]",
        "weight_decay_schedule = 'cosin'\nweight_decay = 0.1",
        "train.weight_decay_schedule",
        25,
        ["did you mean 'cosine'?"],
    ),
    ("[train]", "regularise.kasa = -1", "train.regularise.kasa", 19, ["a number, at least 0; got -1"]),
    ("[train]", "regularise.consistency = -1", "train.regularise.consistency", 26, ["at least 0; got -1"]),
    ("[train]", "regularise.orthogonalise = 1.5", "train.regularise.orthogonalise", 28, ["whole number", "got 1.5"]),
    (
        "[train]",
        "answered = 0\neval_every = 1\nearly_stopping = 1",
        "train.answered",
        12,
        ["a whole number, at least 1; got 0"],
    ),
    ("[[adapt]]", "modules = 'q_proj'", "adapt[0].modules", 11, ['write ["q_proj"]']),
    ("[[adapt]]", "modules = ['q_proj', '']", "adapt[0].modules[1]", 22, ['non-empty string; got ""']),
    ("[[adapt]]", "init = 'delta'", "adapt[0].init", 1, ["needs finetuned"]),
    ("[[adapt]]", "finetuned = 'x'", "adapt[0].finetuned", 1, ["belongs to init = 'delta'"]),
    ("[[adapt]]", "components = 'minor'\ninit = 'zero'", "adapt[0].components", 1, ["belongs to init = 'weights'"]),
    ("[[adapt]]", "components = 'mino'", "adapt[0].components", 14, ["did you mean 'minor'?"]),
    (
        "[[adapt]]",
        "shape = 'auto'\ncomponents = 'minor'\ninit = 'weights'",
        "adapt[0].shape",
        1,
        ["strongest terms hold most"],
    ),
    (
        "[[adapt]]",
        "rank = { policy = 'elbow' }\ncomponents = 'minor'\ninit = 'weights'",
        "adapt[0].rank",
        1,
        ["policy = 'elbow' does not go with components = 'minor'"],
    ),
    (
        "[[adapt]]",
        "calibration_batches = 2\ncomponents = 'minor'\ninit = 'weights'",
        "adapt[0].calibration_batches",
        1,
        ["does not go with components = 'minor'", "strongest on"],
    ),
    (
        "[[adapt]]",
        "rank = { policy = 'energy' }\ninit = 'truncated'",
        "adapt[0].rank",
        1,
        ["policy = 'energy' does not go with init = 'truncated'"],
    ),
    (
        "[[adapt]]",
        "train_factors = ['right']\ninit = 'truncated'",
        "adapt[0].train_factors",
        1,
        ["does not go with init = 'truncated', whose terms are trained whole"],
    ),
    (
        "[[adapt]]",
        "calibration_batches = 2\ninit = 'nystrom'",
        "adapt[0].calibration_batches",
        1,
        ["does not go with init = 'nystrom': a sample is taken of the weight alone"],
    ),
    ("[[adapt]]", "init = 'adapter'", "adapt[0].init", 1, ["needs adapter, the folder of the finished adapter"]),
    ("[[adapt]]", "adapter = 'x'", "adapt[0].adapter", 1, ["belongs to init = 'adapter'"]),
    (
        "[[adapt]]",
        "rank = { policy = 'fixed', rank = 2 }\ninit = 'adapter'\nadapter = 'x'",
        "adapt[0].rank",
        1,
        ["rank does not go with init = 'adapter': ranks and factor shapes are the adapter's"],
    ),
    ("[[adapt]]", "scale = 2\ninit = 'adapter'\nadapter = 'x'", "adapt[0].scale", 1, ["scale does not go with"]),
    # rank policies
    ("[[adapt]]", "rank = 4", "adapt[0].rank", 8, ['write rank = { policy = "fixed", rank = 4 }']),
    ("[[adapt]]", "rank = { rank = 4 }", "adapt[0].rank.policy", 8, ["missing", "'fixed', 'energy', 'elbow'"]),
    ("[[adapt]]", "rank.policy = 'fxed'", "adapt[0].rank.policy", 15, ["did you mean 'fixed'?"]),
    (
        "[[adapt]]",
        "rank = { policy = 'fixed', threshold = 0.5 }",
        "adapt[0].rank.threshold",
        28,
        ["threshold belongs to policy 'energy' or 'spectrum'; this rule's policy is 'fixed'"],
    ),
    ("[[adapt]]", "rank = { policy = 'fixed', rank = 0 }", "adapt[0].rank.rank", 35, ["at least 1; got 0"]),
    ("[[adapt]]", "rank = { policy = 'budget' }", "adapt[0].rank.parameters", 8, ["required, but missing"]),
    (
        "[[adapt]]",
        "rank = { policy = 'elbow', min = 9 }",
        "adapt[0].rank.min",
        28,
        ["(9) is larger than max (8, the d"],
    ),
    ("[[adapt]]", "rank = { policy = 'elbow', max = 65 }", "adapt[0].rank.max", 28, ["larger than pool (64, the"]),
    # contradictions
    ("[base]", "hub = 'a/b'", "base.hub", 1, ["hub and builtin exclude each other"]),
    ("[train]", "epochs = 1", "train.steps", 1, ["steps and epochs exclude each other"]),
    ("[train]", "early_stopping = 2", "train.early_stopping", 1, ["needs eval_every"]),
    ("[train]", "answered = 50", "train.answered", 1, ["needs early_stopping"]),
    ("[train]", 'weight_decay_schedule = "cosine"', "train.weight_decay_schedule", 1, ["belongs to weight_decay"]),
    ("[output]", 'measure = ["intruder"]', "output.measure[0]", 12, ["'intruders'"]),
    ("[train.data]", "split = 'test'", "train.data.split", 1, ["split belongs to hub"]),
    ("[train.data]", "eval_frac = 0.1", "train.data.eval_frac", 1, ["does not go with builtin"]),
    ("[output]", "merged_dtype = 'float16'", "output.merged_dtype", 1, ["would be ignored"]),
]


@pytest.mark.parametrize(("table", "line", "key", "column", "fragments"), CASES, ids=[case[1] for case in CASES])
def test_one_problem(table: str, line: str, key: str, column: int, fragments: list[str]) -> None:
    if table == "[adapt]":
        text, number = GOOD.replace("[[adapt]]", "[adapt]"), 4
    else:
        text, number = with_line(table, line)
    if key == "train.steps":
        number += 1  # the second of the two is blamed
    problems = problems_of(text)
    assert [(p.key, p.line, p.column) for p in problems] in ([(key, number, column)], [(key, number, column)] * 2)
    said = " ".join(f"{p.message} ({p.hint})" for p in problems)
    for fragment in fragments:
        assert fragment in said


def test_the_good_manifest_is_good() -> None:
    assert parse_manifest(GOOD, "m.toml").train.steps == 10


def test_all_problems_at_once_in_the_order_of_the_file() -> None:
    text = """\
[base]
path = "x"
hub = "y"
dtype = "bf16"
[[adapt]]
layers = 3
[[adapt]]
rank = { policy = "energy", threshold = 2, parameters = 3 }
[train]
learning_rate = "fast"
"""
    assert [(p.key, p.line) for p in problems_of(text)] == [
        ("schema", 0),
        ("base.hub", 3),
        ("base.dtype", 4),
        ("adapt[0].layers", 6),
        ("adapt[1].rank.threshold", 8),
        ("adapt[1].rank.parameters", 8),
        ("train.data", 9),
        ("train.learning_rate", 10),
    ]


def test_missing_tables_have_no_place_and_missing_keys_have_their_table_s() -> None:
    problems = {p.key: p for p in problems_of("schema = 1\n\n[train]\nsteps = 1\n")}
    assert (problems["base"].line, problems["train.data"].line) == (0, 3)
    assert "expected a table" in problems["base"].message
    assert "The frozen base model" in str(problems["base"].hint)


def test_a_base_of_no_kind() -> None:
    (problem,) = problems_of(GOOD.replace('builtin = "tiny"', ""))
    assert (problem.key, problem.line) == ("base", 2)
    assert problem.message == "expected one of builtin, path, hub; got none of them"


@pytest.mark.parametrize(
    ("text", "line", "column", "fragment"),
    [
        ("a = [1,\n", 2, 1, "the file ends inside an array"),
        ("a = 1\na = 2\n", 2, 6, "a key is written twice"),
        ("[base]\n[base]\n", 2, 6, "written twice"),
        ("a = yes\n", 1, 5, "text stands in quotes"),
        ("a = 'x\n", 2, 1, "the file ends inside an array, a table or a string"),
        ("a\n", 1, 2, "is not valid TOML"),
        ("", 0, 0, "is empty"),
        ("# nothing but a comment\n", 0, 0, "is empty"),
        ("a = " + "[" * 20_000, 0, 0, "nested too deeply"),
        ("a = " + "1" * 5_000, 0, 0, "too many digits"),
    ],
)
def test_not_toml(text: str, line: int, column: int, fragment: str) -> None:
    (problem,) = problems_of(text)
    assert (problem.line, problem.column) == (line, column)
    assert fragment in f"{problem.message} {problem.hint}"


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("schema = 2", ["reads version 1; got 2", "a newer soka-serve"]),
        ("schema = 0", ["got 0", "write schema = 1"]),
        ("schema = true", ["expected the integer 1; got true"]),
        ("schema = 1.0", ["expected the integer 1; got 1.0"]),
        ('schema = "1"', ['expected the integer 1; got "1"']),
        ("", ["required, but missing", "write schema = 1 on the first line"]),
        ("version = 1", ["required, but missing"]),
    ],
)
def test_version(line: str, fragments: list[str]) -> None:
    problems = problems_of(GOOD.replace("schema = 1", line))
    said = " ".join(f"{p.message} {p.hint}" for p in problems)
    for fragment in fragments:
        assert fragment in said
    assert problems[0].key == "schema"


def test_another_version_silences_the_rest() -> None:
    (problem,) = problems_of("unheard_of = 3\nschema = 7\n")
    assert (problem.key, problem.line, problem.column) == ("schema", 2, 10)


@pytest.mark.parametrize(
    ("raw", "line", "column", "fragment"),
    [
        (b"a = 1\nb = '\xff'\n", 2, 6, "not UTF-8: byte 0xff at offset 11"),
        (b"\xef\xbb\xbfschema = 1\n", 1, 1, "byte-order mark"),
        ("schema = 1\n".encode("utf-16"), 1, 1, "is UTF-16"),
    ],
)
def test_encodings(tmp_path: Path, raw: bytes, line: int, column: int, fragment: str) -> None:
    file = tmp_path / "m.toml"
    file.write_bytes(raw)
    with pytest.raises(ManifestError, match=fragment) as caught:
        read_manifest(file)
    (problem,) = caught.value.problems
    assert (problem.line, problem.column) == (line, column)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "math.toml").write_text(GOOD)
    with pytest.raises(ManifestError, match=r"there is no such file \(did you mean .*math\.toml\?\)"):
        read_manifest(tmp_path / "maths.toml")
    with pytest.raises(ManifestError, match=r"is a directory; expected a TOML file \(it holds math\.toml\)"):
        read_manifest(tmp_path)
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path / "math.toml" / "x")
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest("a\0b")


def test_a_file_name_that_cannot_name_a_build(tmp_path: Path) -> None:
    file = tmp_path / "my manifest.toml"
    file.write_text(GOOD)
    with pytest.raises(ManifestError, match=r'"my manifest", cannot name a build'):
        read_manifest(file)
    file.write_text('name = "fine"\n' + GOOD)
    assert read_manifest(file).manifest.name == "fine"


def test_the_line_that_is_printed() -> None:
    text, _ = with_line("[train]", "method = 'sokka'")
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text, "dir/m.toml")
    assert str(caught.value) == (
        "dir/m.toml:6:10: train.method: expected 'soka', 'lora', 'pissa', 'lokr' or 'full'; "
        "got \"sokka\" (did you mean 'soka'?)"
    )


def test_long_values_are_shortened() -> None:
    text, _ = with_line("[base]", f"dtype = '{'x' * 10_000}'")
    (problem,) = problems_of(text)
    assert len(problem.message) < 200
    assert problem.message.endswith("…")
