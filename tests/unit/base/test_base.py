"""A plan and a build open each file of the base once.

An audit hook sees every opening that Python makes. Three kinds of reading cannot be shared, and are counted apart:
hashing, which reads every byte; a tensor that is decomposed, which is read when its turn comes; and what transformers
and PEFT open: the tokenizer, the weights to train on and to answer with, and the config when an adapter is saved.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from soka_serve.builtin import base_directory
from tests.support import preloaded

MANIFEST = """\
schema = 1
name = "small"
[base]
path = "base"
[[adapt]]
modules = ["q_proj"]
layers = "0"
rank = {{ policy = "fixed", rank = 2 }}
[train]
steps = 1
batch_size = 2
max_length = 96
[train.data]
builtin = "math"
limit = 16
[eval]
limit = 2
max_new_tokens = 4
[output]
dir = "{build}"
write = ["adapter"]
"""
PROGRAM = """\
import json, os, sys, threading
folder, seen, here = sys.argv[1], [], threading.local()
KINDS = {"open_model": "model", "build_meta_model": "model", "open_tokenizer": "tokenizer", "sha256_file": "hash",
    "_read_into": "tensor", "get_peft_model_state_dict": "adapter"}

def hook(event, arguments):
    if event != "open" or not isinstance(arguments[0], str | bytes) or getattr(here, "busy", False):
        return
    here.busy = True
    try:
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if os.path.dirname(path) == folder and os.path.isfile(path):
            frame, kind = sys._getframe(1), "own"
            while frame is not None and kind == "own":
                kind, frame = KINDS.get(frame.f_code.co_name, "own"), frame.f_back
            seen.append((os.path.basename(path), kind))
    finally:
        here.busy = False

sys.addaudithook(hook)
import soka_serve
call = getattr(soka_serve, sys.argv[2])
call(sys.argv[3], **({"progress": False} if sys.argv[2] == "build" else {}))
print(json.dumps(seen))
"""


def _openings(folder: Path, call: str) -> dict[str, Counter[str]]:
    """By kind, how often each file of the base is opened."""
    shutil.copytree(base_directory(), folder / "base")
    (folder / "small.toml").write_text(MANIFEST.format(build=folder / "build"))
    command = [preloaded.CODE, PROGRAM, (folder / "base").resolve(), call, folder / "small.toml"]
    done = preloaded.run("soka", command, cwd=folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, Counter[str]] = {}
    for name, kind in json.loads(done.stdout.splitlines()[-1]):
        found.setdefault(kind, Counter())[name] += 1
    return found


def test_a_plan_opens_each_file_of_the_base_once(tmp_path: Path) -> None:
    found = _openings(tmp_path, "plan")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= found["own"].keys()
    assert set(found["own"].values()) == {1}, found["own"]
    assert set(found["hash"].values()) == {1}, found["hash"]
    assert found.keys() == {"own", "hash"}


@pytest.mark.slow
def test_a_build_opens_each_file_of_the_base_once(tmp_path: Path) -> None:
    found = _openings(tmp_path, "build")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= found["own"].keys()
    assert set(found["own"].values()) == {1}, found["own"]
    assert set(found["hash"].values()) == {1}, found["hash"]
    assert found["tensor"] == {"model.safetensors": 1}  # the one weight that is adapted
    assert found["tokenizer"]["tokenizer_config.json"] >= 1
    assert found["model"]["config.json"] >= 2
    assert found.keys() == {"own", "hash", "tensor", "tokenizer", "model", "adapter"}
