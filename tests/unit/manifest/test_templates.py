"""Templates that loop, grow or call themselves without end; the environment that all are rendered in."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from soka_serve.data.examples import DataReader
from soka_serve.errors import DataError
from soka_serve.manifest.schema import Data
from soka_serve.manifest.template_env import is_plain
from soka_serve.manifest.templates import RowTemplate, parse_template, render_chats
from tests.support.hostile_templates import ENDLESS
from tests.unit.data.test_examples import write_rows


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    write_rows(tmp_path / "d.jsonl", [{"q": "word " * 40, "a": "b"}] * 40)
    return tmp_path


@pytest.mark.parametrize("key", ["prompt", "completion"])
@pytest.mark.parametrize("name", ["a range", "repetition", "a macro"])
def test_the_key_is_named(rows: Path, name: str, key: str) -> None:
    data = Data.model_validate({"jsonl": "d.jsonl", "prompt": "{{ q }}", "completion": "{{ a }}", key: ENDLESS[name]})
    with pytest.raises(DataError, match=rf"train\.data\.{key}: the template"):
        DataReader(data, rows).examples("train")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDLESS)
def test_templates_without_an_end(rows: Path, name: str) -> None:
    """Bounded time and memory, and an error that names the key."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    data = Data.model_validate({"jsonl": "d.jsonl", "prompt": ENDLESS[name], "completion": "{{ a }}"})
    with pytest.raises(DataError, match=r"train\.data\.prompt: the template"):
        DataReader(data, rows).examples("train")
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 8


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ENDLESS)[::3])
def test_chat_templates_without_an_end(name: str) -> None:
    source = ENDLESS[name].replace("q", "messages[0].content")
    chats: Any = [([{"role": "user", "content": "word " * 40}], False)] * 40
    found = render_chats(source, chats, special_tokens={}, name="the chat template of base")
    error = next(text for text in found if isinstance(text, DataError))
    assert "chat template" in error.message


def test_a_template_that_takes_a_little_too_long_on_each_row() -> None:
    """Each row alone is within its time; all of them are not."""
    template = RowTemplate("{% for i in range(99999) %}{{ '' }}{% endfor %}" * 5, "train.data.prompt")
    found = template.render_many([(f"d:{i}", {}) for i in range(1000)])
    assert isinstance(found[-1], DataError)
    assert "processor time" in found[-1].message
    assert len(found) < 1000


def test_the_row_that_takes_too_long_is_named() -> None:
    template = RowTemplate("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}", "k")
    found = template.render_many([(f"d:{i}", {"n": 99999 if i == 7 else 1}) for i in range(20)])
    assert found[:7] == [""] * 7
    assert isinstance(found[7], DataError)
    assert found[7].message.startswith("d:7: k: the template takes more than")
    assert template.render({"n": 2}, "d") == ""  # another process goes on


def test_nothing_of_the_environment_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jinja2 before 3.1.6 gave a template Python's objects through `|attr('format')`."""
    monkeypatch.setenv("SOKA_TEST_SECRET", "abc123")
    for source in (
        "{{ ('{0.__class__.__init__.__globals__}'|attr('format'))(q) }}",
        "{{ q|attr('__class__') }}",
        "{{ q.__class__ }}",
        "{% set f = '{0.__init__.__globals__}'.format_map %}{{ f({'0': q}) }}",
        "{{ cycler.__init__.__globals__.os.environ }}",
        "{{ lipsum.__globals__.os.environ }}",
        "{{ self._TemplateReference__context }}",
    ):
        try:
            text = RowTemplate(source, "k").render({"q": "x"}, "d")
        except DataError as error:
            text = error.message
        assert "abc123" not in text
        assert "<class" not in text


def test_the_process_of_templates_does_not_have_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "abc123")
    RowTemplate("{% for i in q %}{{ i }}{% endfor %}", "k").render({"q": "x"}, "d")
    from soka_serve.manifest.template_child import _children

    environment = Path(f"/proc/{_children[0]._process.pid}/environ").read_bytes()
    assert "PATH" in os.environ
    assert environment.count(b"=") <= 3


@pytest.mark.parametrize("source", ["{{ q.append(1) }}", "{% for i in [1] %}{{ q.append(1) }}{% endfor %}"])
def test_values_of_a_row_cannot_be_changed(source: str) -> None:
    row = {"q": [1]}
    with pytest.raises(DataError, match="unsafe"):
        RowTemplate(source, "k").render(row, "d")
    assert row == {"q": [1]}


@pytest.mark.parametrize(
    ("source", "plain"),
    [
        ("Question: {{ question }}\nAnswer:", True),
        ("{{ answer.split('####')[-1].strip() }}", True),
        ("{{ a|trim }} {{ b or '' }}{% if c is defined and c %}\n{{ c }}{% endif %}", True),
        ("{{ instruction + '\n' + input }}", True),
        ("{{ a.replace('<<', '') }}", True),
        ("{{ a.replace('', 'xx') }}", False),
        ("{{ a.replace(b, c) }}", False),
        ("{{ a * 3 }}", False),
        ("{{ a.join(b) }}", False),
        ("{{ a|join(b) }}", False),
        ("{{ a|attr('x') }}", False),
        ("{{ a.ljust(10) }}", False),
        ("{% for x in a %}{{ x }}{% endfor %}", False),
        ("{% set x = a %}{{ x }}", False),
        ("{{ a }}" * 17, False),
        ("{{ range(9) }}", False),
    ],
)
def test_what_is_rendered_in_this_process(source: str, plain: bool) -> None:
    assert is_plain(parse_template(source), source) is plain


def test_both_ways_give_the_same(rows: Path) -> None:
    """Texts and errors, of templates rendered here and in the other process."""
    row = {"a": "x\ud800é", "n": None, "b": {"c": [1, 2]}}
    for source in ("{{ a }}|{{ b.c[0] }}\n", "{{ z }}", "{{ n }}", "{{ b.d }}", "{{ a + 1 }}", "{{ a }}{{ y }}{{ z }}"):
        outcomes = []
        for text in (source, source + "{% for i in [] %}{% endfor %}"):
            try:
                outcomes.append(RowTemplate(text, "k").render(row, "d:1"))
            except DataError as error:
                outcomes.append(f"{error.message} {error.hint}")
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ " + "(" * 50_000, "nested too deeply"),
        ("{{ a" + ".a" * 50_000 + " }}", "nested too deeply"),
        ("{% for i in x %}" * 9_000, "nested too deeply"),
        ("{{ " + "9" * 6_000 + " }}", "does not parse"),
        ("x" * 300_000, "300,000 characters"),
    ],
    ids=["brackets", "attributes", "loops", "digits", "length"],
)
def test_templates_beyond_measure(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        RowTemplate(source, "train.data.prompt")
    with pytest.raises(ValueError, match=message):
        Data(jsonl="x", prompt=source)
    found = render_chats(source, [([{"role": "user", "content": "x"}], False)], special_tokens={})
    assert isinstance(found[0], DataError)


def test_the_process_ends_with_its_parent(root: Path) -> None:
    code = (
        "from soka_serve.manifest.template_child import _children\n"
        "from soka_serve.manifest.templates import RowTemplate\n"
        "RowTemplate('{% for i in q %}{% endfor %}', 'k')\nprint(_children[0]._process.pid)\n"
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert os.getpid() != pid
