"""Names of sums of adapters, and what is kept of sums."""

from __future__ import annotations

import json

import pytest

from soka_vllm.engine import EngineAdapters
from soka_vllm.settings import SUMS_VARIABLE, sums_limit
from soka_vllm.sum_names import LONGEST_SUM, SumError, Term, may_be_sum, parse_sum, sum_name, sum_terms
from soka_vllm.sums import members_of

KNOWN = {"math", "code", "c++", "a+b", "gpt-4", "1e", "2", "org/name:v2"}


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("math+0.5*code", [(1, "math"), (0.5, "code")]),
        (" math\t+ 0.5 * code ", [(1, "math"), (0.5, "code")]),
        ("math+-0.5*code", [(1, "math"), (-0.5, "code")]),
        ("math++0.5*code", [(1, "math"), (0.5, "code")]),  # a sign
        ("1e+3*code", [(1000, "code")]),
        ("1e+code", [(1, "1e"), (1, "code")]),
        ("2*2+.5*gpt-4", [(2, "2"), (0.5, "gpt-4")]),
        ("c++", [(1, "c++")]),
        ("c+++math", [(1, "c++"), (1, "math")]),
        ("2*c++ + math", [(2, "c++"), (1, "math")]),
        ("a+b+math", [(1, "a+b"), (1, "math")]),  # the longest name that is loaded
        ("b+a", [(1, "b"), (1, "a")]),
        ("3*org/name:v2", [(3, "org/name:v2")]),
        ("math+", [(1, "math"), (1, "")]),
        ("+", [(1, ""), (1, "")]),
        ("0.5*", [(0.5, "")]),
    ],
)
def test_terms(text: str, terms: list[tuple[float, str]]) -> None:
    assert may_be_sum(text)
    assert parse_sum(text, KNOWN) == [Term(*term) for term in terms]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("inf*math", "the scale inf of `math` is no finite number"),
        ("math + -NaN * code", "the scale -NaN of `code` is no finite number"),
        ("9" * 400 + "*math", "of `math` is no finite number"),
        ("x*math", "the scale `x` of `math` is not a number"),
        ("math-0.5*code", "a negative scale is written `math+-0.5*code`"),
        ("math*0.5", "the scale comes first: `0.5*math`"),
        ("2*x*math", "the scale `x` of `math` is not a number"),
        ("*math", "the scale `` of `math` is not a number"),
        ("+".join(["math"] * 17), "at most 16 terms"),
        ("\x1b*math", "the scale `\\x1b` of"),
    ],
)
def test_scales_that_are_none(text: str, said: str) -> None:
    with pytest.raises(SumError) as found:
        parse_sum(text, KNOWN)
    assert said in str(found.value)
    assert len(str(found.value)) < 600


def test_one_name_for_each_sum() -> None:
    spellings = [
        "math+0.5*code",
        "0.5*code+math",
        "code+-0.5*code+1.0*math",
        "5e-1*code + math",
    ]
    assert {sum_name(sum_terms(parse_sum(text, KNOWN))) for text in spellings} == {"0.5*code+math"}
    assert sum_name(sum_terms(parse_sum("1e-9*math+0*code+1e22*c++", KNOWN))) == "1e+22*c+++1e-09*math"
    again = sum_terms(parse_sum("1e+22*c+++1e-09*math", KNOWN))
    assert again == [Term(1e22, "c++"), Term(1e-9, "math")]
    for text in ("0*math", "math+-1*math"):
        with pytest.raises(SumError, match="nothing is left"):
            sum_terms(parse_sum(text, KNOWN))
    with pytest.raises(SumError, match="add up to inf"):
        sum_terms(parse_sum("1e308*math+1e308*math", KNOWN))


def test_what_is_no_sum() -> None:
    assert not may_be_sum("math")
    assert not may_be_sum(None)
    assert not may_be_sum("a+" * LONGEST_SUM)


@pytest.mark.parametrize("path", ["soka-sum:", "soka-sum:[]", "soka-sum:[1]", "soka-sum:[[1]]", "soka-sum:{"])
def test_paths_that_name_no_members_are_refused(path: str) -> None:
    class Asked:
        lora_path = path

    with pytest.raises(ValueError, match="sum"):
        members_of(Asked())
    Asked.lora_path = "soka-sum:" + json.dumps([[1.0, "x", 1, "soka-sum:[]", False, 0]])
    with pytest.raises(ValueError, match="a sum is of adapters"):
        members_of(Asked())
    Asked.lora_path = "/some/where"
    assert members_of(Asked()) == []


def test_few_sums_are_kept() -> None:
    adapters = EngineAdapters(limit=1000, most_sums=2)
    for number in range(1, 5):
        adapters.nbytes[number] = 1
        adapters.roots[number] = None
        if number > 1:
            adapters.sums[number] = "path"
    adapters.touch(2)
    assert adapters.sums_to_drop(needed=set()) == [3, 4]
    assert adapters.sums_to_drop(needed={3}) == [4, 2]
    adapters.forget(3)
    assert list(adapters.sums) == [4, 2]
    assert 3 not in adapters.roots
    adapters.forget(1)
    assert 1 in adapters.roots  # an adapter's stay where they were


@pytest.mark.parametrize("text", ["-1", "x", "1.5", "", "9" * 30])
def test_the_limit_is_a_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.delenv(SUMS_VARIABLE, raising=False)
    assert sums_limit() == 32
    monkeypatch.setenv(SUMS_VARIABLE, text)
    with pytest.raises(ValueError, match=SUMS_VARIABLE):
        sums_limit()
