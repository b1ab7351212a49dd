"""The locator finds every key that tomllib finds, where it stands."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soka_serve.manifest.locate import Path, Position, locate

TEXT = """\
# a comment with [brackets] = "quotes"
top = 1   # after a value
"quoted key" = 'lit # not a comment'
"esc\\"aped" = "a \\" ] } , # x"
'lit.eral'.below = true
a.b . c = 3
multi = \"\"\"
fake = 1
[fake]
\"\"\"\"\"
raw = '''x = 1 '''
list = [
    1,  # one
    [2, 3], # [nested
    "]",
    { k = "v", deep.er = [4] },
]
inline = { one = 1, "two" = { three = 3 }, four.five = 5 }
date = 1979-05-27 07:32:00

[table.below]
x = 1
[table]
y = 1
[[many]]
x = 1
[[many]]
x = 2
[many.sub]
z = 3
[[many.subs]]
w = 4
[[many.subs]]
w = 5
"""


def paths(node: Any, path: Path = ()) -> Iterator[Path]:
    if path:
        yield path
    if isinstance(node, dict):
        for key, value in node.items():
            yield from paths(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from paths(value, (*path, index))


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (("top",), (2, 1), (2, 7)),
        (("quoted key",), (3, 1), (3, 16)),
        (('esc"aped',), (4, 1), (4, 15)),
        (("lit.eral", "below"), (5, 12), (5, 20)),
        (("a",), (6, 1), (6, 11)),
        (("a", "b", "c"), (6, 7), (6, 11)),
        (("multi",), (7, 1), (7, 9)),
        (("raw",), (11, 1), (11, 7)),
        (("list", 0), (13, 5), (13, 5)),
        (("list", 1, 1), (14, 9), (14, 9)),
        (("list", 2), (15, 5), (15, 5)),
        (("list", 3, "deep", "er", 0), (16, 27), (16, 27)),
        (("inline", "two", "three"), (18, 31), (18, 39)),
        (("inline", "four", "five"), (18, 49), (18, 56)),
        (("table",), (23, 1), (23, 1)),
        (("table", "below"), (21, 1), (21, 1)),
        (("table", "below", "x"), (22, 1), (22, 5)),
        (("many", 0), (25, 1), (25, 1)),
        (("many", 1, "x"), (28, 1), (28, 5)),
        (("many", 1, "sub", "z"), (30, 1), (30, 5)),
        (("many", 1, "subs", 1, "w"), (34, 1), (34, 5)),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_places(path: Path, key: tuple[int, int], value: tuple[int, int], newline: str) -> None:
    places = locate(TEXT.replace("\n", newline))
    assert (places.key(path), places.value(path)) == (Position(*key), Position(*value))


def test_every_path_is_found() -> None:
    found = locate(TEXT).keys
    assert [path for path in paths(tomllib.loads(TEXT)) if path not in found] == []


def test_unknown_paths_fall_back_to_the_table_around_them() -> None:
    places = locate(TEXT)
    assert places.key(("many", 1, "nothing", 3)) == Position(27, 1)
    assert places.key(("nothing",)) is None


_keys = st.one_of(st.from_regex(r"[a-c]{1,2}", fullmatch=True), st.sampled_from(['"q k"', "'l.k'", '"\\u0041"', '""']))
_scalars = st.sampled_from(
    [
        "1",
        "true",
        "-0.5e3",
        "inf",
        "1979-05-27T07:32:00Z",
        '"s"',
        "'l # ]'",
        '"""m\n[x]\n"""',
        "'''r\n= 1'''''",
        '"\\\\"',
    ]
)
_values = st.recursive(
    _scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: "[" + " ,\n # c\n".join(items) + "\n]"),
        st.lists(st.tuples(_keys, inner), max_size=3).map(
            lambda pairs: "{ " + ", ".join(f"{key} = {value}" for key, value in pairs) + " }"
        ),
    ),
    max_leaves=6,
)
_dotted = st.lists(_keys, min_size=1, max_size=3).map(" . ".join)
_lines = st.one_of(
    st.tuples(_dotted, _values).map(lambda pair: f"{pair[0]} = {pair[1]} # c"),
    _dotted.map(lambda key: f"[ {key} ]"),
    _dotted.map(lambda key: f"[[{key}]] # c"),
    st.just("# [c] = '"),
)


@given(st.lists(_lines, max_size=8).map("\n".join))
def test_every_path_of_any_text_is_found(text: str) -> None:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    places = locate(text)
    lines = text.split("\n")
    for path in paths(data):
        for place in (places.keys[path], places.values[path]):
            assert 1 <= place.line <= len(lines)
            assert 1 <= place.column <= len(lines[place.line - 1])
