"""Manifests, and the data and bases that they name, spoilt at random, through `plan`."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

from hypothesis import strategies as st

from soka_serve.builtin import base_directory
from soka_serve.manifest.starter import starter_manifest
from tests.fuzzing.limits import run, snapshot
from tests.fuzzing.spoil import JSON_TEXTS, NODES, TOML_TEXTS
from tests.support.hostile_templates import ENDLESS

ROOT = Path(__file__).resolve().parents[2]

_WORDS = "schema base adapt train data rank policy fixed energy layers shape modules"
_VALUE_WORDS = "1 0x1F -3.5 nan inf true 1979-05-27 07:32:00 '8' 'tiny'"
_MARKS = [*"[]{}=.,#\"'\n \\\t\0é", "[[", "]]", '"""', "'''", "\r\n", "\U0001f600", "\ufeff"]
TOKENS = st.sampled_from([*_WORDS.split(), *_VALUE_WORDS.split(), *_MARKS])
_VALUES = st.sampled_from(
    [
        *["1", "0", "-1", "true", "1.5", "inf", "nan", "'x'", "''", "1979-05-27", "1e400", "0x" + "f" * 300],
        *["[]", "[1]", "['q_proj']", "{}", "[{}]", "[[1], [2]]", "[" * 30 + "]" * 30],
        *["{ policy = 'budget' }", "{ policy = 3 }"],
    ]
)
_SOURCES = st.sampled_from(
    [*(path.read_text() for path in sorted((ROOT / "manifests").rglob("*.toml"))), starter_manifest("x")]
)
_HEADERS = st.sampled_from(["[base]", "[[base]]", "[adapt]", "[[adapt]]", "[train.data]", "[x.y]"])
_LINE_EDITS = st.sampled_from(["drop", "repeat", "value", "key", "cut", "insert", "header", "uncomment"])


@st.composite
def spoilt_manifests(draw: st.DrawFn) -> str:
    """The text of a manifest that ships, one to four of its lines changed."""
    lines = draw(_SOURCES).split("\n")
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, len(lines) - 1))
        kind, line = draw(_LINE_EDITS), lines[i]
        if kind == "drop" and len(lines) > 1:
            del lines[i]
        elif kind == "repeat":
            lines.insert(i, line)
        elif kind == "value" and "=" in line:
            lines[i] = line.split("=")[0] + "= " + draw(_VALUES)
        elif kind == "key" and "=" in line:
            lines[i] = draw(TOKENS) + " =" + line.split("=", 1)[1]
        elif kind == "cut":
            lines[i] = line[: draw(st.integers(0, len(line)))]
        elif kind == "insert":
            at = draw(st.integers(0, len(line)))
            lines[i] = line[:at] + draw(TOKENS) + line[at:]
        elif kind == "header":
            lines[i] = draw(_HEADERS)
        elif kind == "uncomment":
            lines[i] = line.removeprefix("# ")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- hostile

_LIST_ITEMS = st.sampled_from(["''", "'q_proj'", "1", "[]", "'a.a'"])
_HOSTILE_LINES = TOML_TEXTS | st.one_of(
    st.builds(lambda item, n: f"[[adapt]]\nmodules = [{', '.join([item] * n)}]", _LIST_ITEMS, st.integers(1, 20_000)),
    st.builds(lambda n: "\n".join(f"k{i} = 1" for i in range(n)), st.integers(1, 20_000)),
    st.builds(lambda n: "\n".join(f"[t{i}]" for i in range(n)), st.integers(1, 20_000)),
)


@st.composite
def hostile_manifests(draw: st.DrawFn) -> str:
    """The text of a manifest that ships, with lines somewhere in it that cost a parser more than their length."""
    lines = draw(_SOURCES).split("\n")
    for _ in range(draw(st.integers(1, 2))):
        lines.insert(draw(st.integers(0, len(lines))), draw(_HOSTILE_LINES))
    return "\n".join(lines)


_TEMPLATES = st.sampled_from([*ENDLESS.values(), "{{ q }}", "{{ q * 3 }}", "{{ a.b }}", "", "{{ q.__class__ }}"])
_GROWN = st.builds(
    lambda parts, count: parts[0] + parts[1] * count + parts[2],
    st.sampled_from(
        [
            *(
                ("{{ a", ".a", " }}"),
                ("{{ ", "(", ""),
                ("{{ ", "9", " }}"),
                ("", "{% for i in q %}", ""),
                ("", "x", ""),
            ),
            *(("{{ q", "|trim", " }}"), ("{{ ", "-", "1 }}"), ("{{ ", "not ", "q }}"), ("{{ [", "[", "")),
            *(("", "{% if q %}", "{% endif %}"), ("{% set x = ", "q ~ ", "q %}"), ("{{ q", "[0]", " }}")),
        ]
    ),
    st.integers(1, 60_000) | st.sampled_from([6_000, 50_000]),
)
TEMPLATES = _TEMPLATES | _GROWN | st.tuples(_TEMPLATES, _TEMPLATES | _GROWN).map("".join)

_GOOD_ROW = json.dumps({"q": "word " * 10, "a": "b", "b": [1, None]})
_ROWS = (
    st.sampled_from(
        [
            *(_GOOD_ROW, "[" * 100_000, '{"q": ' + "9" * 5000 + "}", "{}", "[]", "null", '{"q": null, "a": "b"}', ""),
            *('{"q": "\\ud800", "a": "\\u0000"}', '{"q": "\\ud83d\\ude00", "a": "b"}', '{"\\udc00": "b"}'),
            *('{"q": "\\u0000", "a": "\\u0000"}', '{"q": 1e999, "a": NaN}', '{"q": "x", "q": "y", "a": "b"}', "\x00"),
            *(
                '{"a":' * 5000,
                '{"q": "' + "x" * 1_000_000 + '", "a": "b"}',
                "\ufeff" + _GOOD_ROW,
                '{"q": {"q": [[[]]]}}',
            ),
        ]
    )
    | JSON_TEXTS
)
_SPARSE = st.sampled_from([2 << 20, 3 << 30, 1 << 40])


def lay_out(draw: st.DrawFn, folder: Path) -> None:
    """A manifest in a folder, with data and a base of its own, some of which is spoilt."""
    data = draw(st.sampled_from(["d.jsonl", "data", "."]))
    table = {("jsonl" if data == "d.jsonl" else "hub"): data, "prompt": draw(TEMPLATES), "completion": "{{ a }}"}
    if draw(st.booleans()):
        table["completion"] = draw(TEMPLATES)
    base = draw(st.sampled_from(["builtin = 'tiny'", "path = 'base'"]))
    lines = [f"schema = 1\nname = 'x'\n[base]\n{base}\n[[adapt]]\n[train]\nsteps = 1\n[train.data]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    (folder / "manifest.toml").write_text("\n".join(lines) + "\n")
    if base.startswith("path"):
        _lay_out_base(draw, folder / "base")
    (folder / "data").mkdir()
    file = folder / ("data/train.jsonl" if data == "data" else data if data != "." else "train.jsonl")
    rows = draw(st.lists(_ROWS, min_size=1, max_size=4))
    file.write_bytes("\n".join([_GOOD_ROW] * draw(st.integers(0, 40)) + rows).encode("utf-8", "surrogatepass"))
    spoilt = draw(st.sampled_from([None, None, file, folder / "data" / "more.jsonl", folder / "manifest.toml"]))
    if spoilt is not None:
        _spoil(draw, spoilt)


def _spoil(draw: st.DrawFn, file: Path) -> None:
    kind = draw(st.sampled_from(["hole", "long", *sorted(NODES)]))
    if kind == "hole":
        file.touch()
        os.truncate(file, draw(_SPARSE))
    elif kind == "long":
        file.write_text("# a line that says nothing\n" * draw(st.sampled_from([1000, 1_000_000])))
    else:
        file.unlink(missing_ok=True)
        NODES[kind](file)


_QUANTISED = ("quantization_config", "compression_config", "text_config")
_METHODS = st.sampled_from(["gptq", "fp8", "new", "", "\x1b[31m", 3, None])
_SAID = (
    st.sampled_from([None, [], {}, "gptq", 3, True, {"load_in_4bit": 1}, {"config_groups": [{"weights": 4}]}])
    | st.fixed_dictionaries({"quant_method": _METHODS, "bits": st.sampled_from([4, "4", None, [4], 10**99])})
    | st.fixed_dictionaries({"quantization_config": st.fixed_dictionaries({"quant_method": _METHODS})})
)
_AUTO = [{"AutoConfig": "x.Y"}, {"AutoModelForCausalLM": ["x.Y", None]}]
_VALUES_OF_KEYS: list[object] = [None, [], {}, "x", ["x", "y"], 3, "llama", *_AUTO]
_TOLERATED = [
    {"lm_head.weight": "shard.safetensors"},
    {"lm_head.weight": "shard.safetensors", "model.layers.0.self_attn.rotary_emb.inv_freq": "shard.safetensors"},
    {"lm_head.weight\x1b[31m": "shard.safetensors"},
]
_OF_FOUR_BYTES = ["F32", "I32", "U32"]


def _store_otherwise(draw: st.DrawFn, file: Path) -> None:
    """The same bytes under other dtypes: of as many bytes, or of fewer with more columns."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    chosen = draw(st.sampled_from([names, names[:1], [name for name in names if "_proj" in name]]))
    dtype = draw(st.sampled_from([*_OF_FOUR_BYTES, "F8_E4M3", "F8_E8M0", "I8", "U8", "BOOL", "F4", "F6_E2M3"]))
    for name in chosen:
        header[name]["dtype"] = dtype
        header[name]["shape"][-1] *= {"F4": 8, "F6_E2M3": 5}.get(dtype, 1 if dtype in _OF_FOUR_BYTES else 4)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _lay_out_base(draw: st.DrawFn, folder: Path) -> None:
    """A copy of the embedded base, with a config, an index or files that are not what they should be."""
    shutil.copytree(base_directory(), folder)
    config = json.loads((folder / "config.json").read_text())
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from([*_QUANTISED, "auto_map", "model_type", "architectures", "vocab_size"]))
        config[key] = draw(_SAID if key in _QUANTISED else st.sampled_from(_VALUES_OF_KEYS))
    (folder / "config.json").write_text(json.dumps(config))
    if draw(st.booleans()):
        index: dict[str, object] = {
            "weight_map": draw(
                st.sampled_from([{}, [], {"x": "../x"}, {"x": 1}, {"x": "model.safetensors"}, *_TOLERATED])
            )
        }
        index |= draw(st.sampled_from([{"metadata": value} for value in (None, [], {}, 3)] + [{}]))
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if draw(st.booleans()):
            (folder / "model.safetensors").rename(folder / "shard.safetensors")
    if draw(st.integers(0, 2)) == 0:
        for file in folder.glob("*.safetensors"):
            _store_otherwise(draw, file)
    if draw(st.integers(0, 3)) == 0:
        _spoil(draw, folder / draw(st.sampled_from(sorted(file.name for file in folder.iterdir()))))


def check_plan(text: str, folder: Path) -> bool:
    """`soka-serve plan` of a manifest plans it or refuses it with a message, and writes nothing beside it.

    Returns:
        Whether it was planned.
    """
    (folder / "manifest.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    return check_planned(folder)


def check_planned(folder: Path) -> bool:
    """`check_plan` of a folder with a manifest."""
    before = snapshot(folder)
    done = run("plan", str(folder / "manifest.toml"))
    assert snapshot(folder) == before
    return done.exit_code == 0
