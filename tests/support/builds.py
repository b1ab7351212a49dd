"""Helpers of the build tests: small manifests on the embedded base, and the command line as a user runs it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from safetensors.torch import load_file

from tests.support import preloaded

# Stage `init` has something to do, and takes two seconds less than with activations.
START = 'init = "weights"\ncalibration_batches = 0'
MANIFEST = """\
schema = 1
name = "small"

[base]
builtin = "tiny"

[[adapt]]
modules = ["q_proj", "v_proj", "down_proj"]
{start}
rank = {{ policy = "fixed", rank = 1 }}

[train]
steps = {steps}
batch_size = 4
learning_rate = {learning_rate}
save_every = {save_every}
log_every = 2
data = {{ builtin = "math", limit = 64 }}

[output]
write = ["adapter", "merged"]
{output}

[eval]
limit = 4
max_new_tokens = 16
"""


def write_manifest(
    directory: Path,
    *,
    steps: int = 6,
    learning_rate: float = 8.0,
    save_every: int = 2,
    output: str = "",
    start: str = START,
    replace: tuple[str, str] | None = None,
) -> Path:
    """Write small.toml into a directory; `replace` swaps a piece of its text."""
    text = MANIFEST.format(steps=steps, learning_rate=learning_rate, save_every=save_every, output=output, start=start)
    if replace is not None:
        assert replace[0] in text
        text = text.replace(*replace)
    path = directory / "small.toml"
    path.write_text(text)
    return path


def run_cli(
    *arguments: str | Path, cwd: Path, timeout_s: float = 300, host: str = "soka"
) -> subprocess.CompletedProcess[str]:
    """Run soka-serve in a process of its own; `host` "vllm" is for what starts vLLM."""
    return preloaded.run(host, ["soka_serve", *arguments], cwd=cwd, timeout=timeout_s)


def start_cli(*arguments: str | Path, cwd: Path, log: Path | None = None) -> preloaded.Program:
    """Start soka-serve in a process of its own; `log` is for what it writes."""
    with Path(os.devnull).open() as nothing, Path(log or os.devnull).open("w") as output:
        return preloaded.start("soka", ["soka_serve", *arguments], cwd=cwd, files=(nothing, output, output))


def adapter_bytes(build: Path) -> bytes:
    """The adapter's weights file, whole."""
    return (build / "adapter" / "adapter_model.safetensors").read_bytes()


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two safetensors files hold the same tensors, bit for bit."""
    import torch

    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
