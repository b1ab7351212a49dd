"""vLLM's Triton kernels for LoRA run from their files alone, as the benchmark on a GPU runs them, and are right."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from eval import vllm_lora
from tests.conftest import NEEDS_VLLM

PROGRAM = """\
import sys
from pathlib import Path
import torch
from eval import vllm_lora

kernels = vllm_lora.load(Path(sys.argv[1]))
assert "vllm" not in sys.modules
torch.manual_seed(0)
x, slots, widths = torch.randn(5, 64).half(), torch.tensor([0, 1, 1, 0, 1]), (48, 32)
down = tuple(torch.randn(2, 1, 4, 64).half() for _ in widths)
up = tuple(torch.randn(2, 1, width, 4).half() for width in widths)
out = torch.randn(5, sum(widths)).half()
before = out.double()
delta = torch.cat([torch.einsum("ti,tri,tor->to", x.double(), d[slots, 0].double(), u[slots, 0].double())
                   for d, u in zip(down, up)], dim=1)
meta = kernels.LoRAKernelMeta.make(2, 5, device="cpu")
meta.prepare_tensors(slots)
arguments = meta.meta_args(5, True)
buffer = torch.empty(2, 5, 4)
kernels.lora_shrink(x, down, buffer, *arguments, 1.0)
kernels.lora_expand(buffer, up, out, *arguments, offset_start=0, add_inputs=True)
error = float((out - before - delta).abs().max() / delta.abs().max())
assert error < 2e-3, error
"""


@NEEDS_VLLM
def test_from_a_zip_file_without_vllm(tmp_path: Path, root: Path) -> None:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    with zipfile.ZipFile(tmp_path / "vllm.whl", "w") as wheel:
        for file in (Path(spec.origin).parent / "lora" / "ops").rglob("*.py"):
            wheel.write(file, file.relative_to(Path(spec.origin).parents[1]))
    vllm_lora.pack(tmp_path / "vllm.whl", tmp_path / "part.zip")
    assert vllm_lora.source_name(tmp_path / "part.zip") == "vllm.whl"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "part.zip")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
