"""Hostile adapters are refused in little time and memory, by every reader, and their refusals are short."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import LoKrConfig, LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key
from transformers import AutoModelForCausalLM

from soka_serve.adapter.format import CONFIG_FILE, LOCK_FILE, read_adapter
from soka_serve.adapter.lokr import look_at_lokr
from soka_serve.adapter.patterns import Matcher, match_for_vllm, matching
from soka_serve.builtin import base_directory
from soka_serve.cli import main
from soka_serve.errors import CheckpointError, SokaError
from soka_serve.io.budget import ReadingBudget, open_regular, read_limited
from soka_serve.io.lockfile import read_lock
from soka_serve.io.safetensors import read_header
from soka_serve.io.toml_text import parse_toml
from soka_vllm.lycoris import look_at_lycoris
from soka_vllm.stock import look_at_lora
from tests.fuzzing.adapters import write_good_adapter
from tests.fuzzing.limits import bounded, limited
from tests.fuzzing.lokr import served
from tests.fuzzing.spoil import copy_of
from tests.support import hostile_adapters as hostile

SECONDS, MEMORY = 10, 512 << 20
ANSWER_CHARACTERS = 8000


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good adapter of each kind."""
    folder = tmp_path_factory.mktemp("good")
    write_good_adapter(folder / "soka")
    targets = ["q_proj", "v_proj", "down_proj"]
    for name, config in (
        ("lokr", LoKrConfig(r=4, alpha=2, target_modules=targets, decompose_both=True, init_weights=False)),
        ("lora", LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)),
    ):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base_directory())
        get_peft_model(model, config).save_pretrained(folder / name)
    return folder


READERS: dict[str, Callable[[Path], object]] = {
    "soka": lambda folder: (read_lock(folder / LOCK_FILE, served()), read_adapter(folder, served())),
    "lokr": lambda folder: look_at_lokr(folder, served()).read(),
    "lora": lambda folder: look_at_lora(folder, served()),
}
KINDS = {
    "soka": hostile.WEIGHTS | hostile.CONFIG | hostile.LOCK | hostile.SOKA,
    "lokr": hostile.WEIGHTS | hostile.CONFIG | hostile.LOKR,
    "lora": hostile.WEIGHTS | hostile.CONFIG | hostile.LORA,
}


@pytest.mark.parametrize(("start", "kind"), [(start, kind) for start, kinds in KINDS.items() for kind in kinds])
def test_hostile_adapters_cost_little(good: Path, start: str, kind: str) -> None:
    spoil, reason = KINDS[start][kind]
    with copy_of(good / start) as folder:
        spoil(folder)
        with bounded(MEMORY):
            if not reason:  # a pattern that matches nothing
                READERS[start](folder)
                return
            with pytest.raises(CheckpointError) as caught:
                READERS[start](folder)
    assert reason in caught.value.message
    assert len(caught.value.message) < ANSWER_CHARACTERS


OF_COMMANDS = hostile.CONFIG | hostile.LOCK | hostile.SOKA | hostile.WEIGHTS
LARGE = ("300,000 tensors", "SoKA with 20,000 modules")  # which are allowed for some models, and read


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in LARGE)) for kind in OF_COMMANDS]
)
def test_commands_refuse_hostile_adapters(good: Path, kind: str, tmp_path: Path) -> None:
    """Where no model is known the limits are wide; that many tensors or modules may be is not refused for its size."""
    with copy_of(good / "soka") as folder:
        OF_COMMANDS[kind][0](folder)
        for command in (
            ["inspect", str(folder)],
            ["merge", str(folder), "--base", "tiny", "--out", str(tmp_path / "m")],
            ["export", str(folder), "--out", str(tmp_path / "e"), "--to", "lora", "--rank", "2"],
        ):
            with limited(3 * SECONDS):
                done = CliRunner().invoke(main, command)
            assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
            assert done.exit_code in (0, 2)
            assert done.exit_code == 2 or command[0] == "inspect" or (kind in LARGE and command[0] == "export"), (
                done.output
            )
            assert "Usage:" not in done.output
            assert done.exit_code == 0 or len(done.output) < ANSWER_CHARACTERS, len(done.output)


def test_lycoris_products(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    name = "lycoris_model_layers_{}_mlp_up_proj.lokr_"
    tensors = {}
    for layer in range(8):
        key = name.format(layer)
        tensors |= {key + "w1": torch.ones(1, 1), key + "w2_a": torch.ones(16_000, 1)}
        tensors |= {key + "w2_b": torch.ones(1, 16_000)}
    save_file(tensors, tmp_path / "kron.safetensors")
    with bounded(MEMORY), pytest.raises(CheckpointError, match="which is too large"):
        look_at_lycoris(tmp_path, served()).read()


def test_good_adapters_are_read_within_the_budget(good: Path) -> None:
    for start, read in READERS.items():
        with bounded(MEMORY):
            read(good / start)


def test_values_on_the_disk_and_products_count(good: Path) -> None:
    tensors = read_header(good / "lokr" / "adapter_model.safetensors")
    budget = ReadingBudget()
    look_at_lokr(good / "lokr", budget)
    assert budget._values > sum(info.numel for info in tensors.values())  # factors in halves, and their products
    with pytest.raises(CheckpointError, match=f"have {budget._values - 1} values by the model"):
        look_at_lokr(good / "lokr", ReadingBudget(values=budget._values - 1, source=" by the model"))
    total = sum(info.numel for info in read_header(good / "soka" / "adapter_model.safetensors").values())
    read_adapter(good / "soka", ReadingBudget(values=total))
    with pytest.raises(CheckpointError, match=f"{total} values in float32, too large: at most {total - 1} are read"):
        read_adapter(good / "soka", ReadingBudget(values=total - 1))


def test_time_runs_out(good: Path) -> None:
    with pytest.raises(CheckpointError, match="reading has taken 0 s"):
        look_at_lokr(good / "lokr", ReadingBudget(seconds=-1))


def test_files_that_are_small_or_compressed_are_no_holes(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"x")
    for size, refused in ((1 << 20, False), (2 << 20, True)):
        with file.open("r+b") as stream:
            stream.truncate(size)
        if refused:
            with pytest.raises(CheckpointError, match=f"a hole: {size} bytes long, of which 4096"):
                read_limited(file, 1 << 30)
        else:
            assert len(read_limited(file, 1 << 30)) == size
    file.write_bytes(bytes(2 << 20))
    assert len(read_limited(file, 2 << 20)) == 2 << 20


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    with limited(2), pytest.raises(OSError, match="not a file but a device"):
        open_regular(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)


# ------------------------------------------------------------------------------------------------------------ patterns

NAMES = [
    *(f"model.layers.{i}.self_attn.{name}_proj" for i in range(12) for name in "qkvo"),
    *("lm_head", "model.embed_tokens", "x.q-proj", "Q_PROJ"),
]
PATTERNS = [
    *("q_proj", "self_attn.q_proj", "model.layers.1.self_attn.q_proj", "^model.layers.1.self_attn.q_proj", "proj"),
    *(
        r"layers\.\d+\.self_attn\.q_proj",
        r".*\.1\..*",
        "(q|v)_proj",
        "q_proj|v_proj",
        "^lm_head$",
        "lm_.*",
        "[qk]_proj",
    ),
    *(r"layers\.1\d\..*", r"layers\.\d{2}\..*", "(?:q|k)_proj", "q_proj)|(.*o_proj", ".", "x.q-proj", "", "model", "^"),
    *(r"layers\.(0|[1-9]|1[01])\..*\.v_proj", r"\w+\.embed_\w+", "q.proj", "(?i:Q)_proj", r".*?k_proj", "[qk]_proj"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_peft(pattern: str) -> None:
    matcher = Matcher(NAMES, ReadingBudget())
    for name in NAMES:
        want = get_pattern_key([pattern], name)
        assert matcher.key_for({pattern: 1}, name) == (pattern if bool(_peft_matches(pattern, name)) else None)
        assert want in (pattern, name)


def _peft_matches(pattern: str, name: str) -> object:
    return re.match(rf"(.*\.)?({pattern})$", name)


def test_the_first_of_several_patterns_counts() -> None:
    patterns = {"v_proj": 1, ".*_proj": 2, "q_proj": 3}
    matcher = Matcher(NAMES, ReadingBudget())
    assert matcher.key_for(patterns, "model.layers.3.self_attn.v_proj") == "v_proj"
    assert matcher.key_for(patterns, "model.layers.3.self_attn.q_proj") == ".*_proj"
    assert matcher.key_for(patterns, "lm_head") is None
    assert matcher.key_for(patterns, "not.among.them.q_proj") == ".*_proj"
    with matching(Matcher(NAMES, ReadingBudget())):
        assert match_for_vllm(None, patterns, "model.layers.3.self_attn.v_proj") == 1
    assert match_for_vllm(None, patterns, "lm_head") is None


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", r"missing \)"),
        (r"(?<=q)_proj", "invalid perl operator"),
        ("x{,3}", "repeats such as"),
        ("x{10}", "repeats such as"),
        ("x{2}" * 3, "repeats such as"),
        ("[[:alpha:]]", r"'\[:' is not read"),
        (r"\pL", "is not read"),
        ("\ud800", "surrogates not allowed"),
        ("x" * 501, "501 characters, at most 500"),
    ],
)
def test_patterns_that_are_refused(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Matcher(NAMES, ReadingBudget()).key_for({pattern: 1}, "q_proj")


def test_many_patterns_run_out_of_time() -> None:
    """Also all of them together, and for each module anew."""
    patterns = {f"(.*a{{9}}.*){{2}}x{i}": 1 for i in range(100_000)}
    matcher = Matcher(NAMES, ReadingBudget(pattern_seconds=0.2))
    with limited(SECONDS):
        for name in NAMES * 20:
            with pytest.raises(ValueError, match="its patterns take too long"):
                matcher.key_for(patterns, name)


def test_no_pattern_takes_long() -> None:
    """Of those that are let through: one call to RE2 on a portion of names."""
    names = ["".join("ab."[i * j % 3] for i in range(200)) for j in range(1, 400)]
    for pattern in (r"(.*a.{9}b.*){9}!", "(.*)*" * 99 + "!", "a?" * 240 + "!", "(.*(a|b).*)" * 45, "(.*a.*b)" * 60):
        started = time.thread_time()
        Matcher(names[:20], ReadingBudget()).key_for({pattern: 1}, names[0])
        assert time.thread_time() - started < 0.5, pattern


# ---------------------------------------------------------------------------------------------------------------- TOML


@pytest.mark.parametrize(
    "text",
    [
        'a = """x"""""\nb = 1',
        "a = '''x'''''\nb = 1",
        'a = """\\"""." """\nb.c = "."',
        "a = 1.5 # " + "a." * 99,
        'a = "' + "a." * 99 + '"',
        f"a = [{', '.join(str(i / 10) for i in range(99))}]",
        ".".join(f"a{i}" for i in range(32)) + " = 1",
        "a = " + "[" * 64 + "]" * 64,
        '"a.b"."c\\"d".\'e.f\' = 2\n["x]".y]\n',
        "a = 1979-05-27T07:32:00.999",
    ],
)
def test_toml_that_is_read(text: str) -> None:
    import tomllib

    assert parse_toml(text) == tomllib.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        ".".join(f"a{i}" for i in range(33)) + " = 1",
        '"a"' + " . 'b'" * 32 + " = 1",
        "x = '''a\n'''\n[" + "a." * 32 + "a]",
        'x = """a"""""\ny = {' + "a." * 32 + 'a = \'"""\'}',
        "a = " + "[" * 65,
        "a = " + "{b = " * 65,
    ],
)
def test_toml_that_is_not_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"more than \d+ (parts|deep) \(at line \d\)"):
        parse_toml(text)


@pytest.mark.parametrize("text", ['\\"""\n' * 20_000, '"' + '\\"' * 50_000, "'''" * 30_001, '"""\\' * 50_000])
def test_toml_with_strings_that_do_not_end(text: str) -> None:
    with limited(5), pytest.raises(ValueError, match=r"at line|Unterminated|Expected"):
        parse_toml(text)


def test_a_key_twice_in_other_json_is_nothing_to_us(tmp_path: Path) -> None:
    """A base's config may have it; only an adapter's is refused."""
    from soka_serve.io.json_files import read_json

    (tmp_path / CONFIG_FILE).write_text('{"a": 1, "a": 2}')
    assert read_json(tmp_path / CONFIG_FILE) == {"a": 2}
    with pytest.raises(SokaError, match="occur twice: a"):
        read_json(tmp_path / CONFIG_FILE, ReadingBudget())


def test_tables_without_end_are_not_read() -> None:
    """Each takes tomllib a while, so that a lock of a megabyte would take seconds."""
    with pytest.raises(ValueError, match=r"more than 2000 tables and lists \(at line 2001\)"):
        parse_toml("".join(f"[a{i}.b.c.d.e.f]\n" for i in range(40_000)))
    assert len(parse_toml("".join(f"[a{i}]\n" for i in range(2000)))) == 2000
