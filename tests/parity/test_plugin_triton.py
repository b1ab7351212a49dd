"""The Triton kernel on a CPU, under Triton's interpreter, against float64 torch.kron.

Triton reads TRITON_INTERPRET when it is imported, and torch may have imported it by now. So one test runs this file
again in a fresh process with the variable set, where the others run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.plugin_layers import Layer, equal_slices_layer, qkv_layer, sharded_layer

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

if os.environ.get("TRITON_INTERPRET") == "1":
    from soka_vllm.ops import triton_ops

    def check(layer: Layer, token_slots: torch.Tensor, tokens: int) -> None:
        store = layer.store

        def add(out: torch.Tensor, x: torch.Tensor, slots: torch.Tensor) -> None:
            triton_ops.add_kron(out, x, slots, store.values, store.table, store.widths)

        layer.check(token_slots, tokens, add)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tokens", [1, 2, 40])
    def test_mixed_batch(dtype: torch.dtype, tokens: int) -> None:
        """Base, an empty slot, one beyond the table, and two adapters with slices of several shapes and without."""
        check(qkv_layer(dtype), torch.tensor([0, 2, -1, 1, 7, 2**40, 2]).repeat(tokens), tokens)

    def test_257_tokens() -> None:
        check(qkv_layer(torch.float16), torch.tensor([0, 2, -1, 1, 7, 2**40, 2]).repeat(257), 257)

    @pytest.mark.parametrize("slot", [-1, 1, 4])
    def test_nothing_to_add(slot: int) -> None:
        check(qkv_layer(torch.float32), torch.full((9,), slot), 9)

    def test_no_tokens() -> None:
        check(qkv_layer(torch.float32), torch.zeros(0, dtype=torch.long), 0)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rank", [1, 3, 16])
    def test_wide_factors(dtype: torch.dtype, rank: int) -> None:
        """86 x 64, m != p, n != q: more than a block in every dimension."""
        layer = Layer(2, [86 * 8], 64 * 8, dtype)
        layer.put(0, 0, rank, (86, 64, 8, 8), seed=20)
        layer.put(1, 0, rank, (8, 8, 86, 64), seed=21)
        check(layer, torch.tensor([0, 1]), 2)
        layer.put(0, 0, rank, (8, 4, 86, 128), seed=22)
        layer.put(1, 0, rank, (43, 128, 16, 4), seed=23)
        check(layer, torch.tensor([0, 1]), 2)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_rank(dtype: torch.dtype) -> None:
        layer = Layer(16, [48], 40, dtype)
        for slot in range(16):
            layer.put(slot, 0, slot + 1, (6, 5, 8, 8) if slot % 2 else (8, 8, 6, 5), seed=slot)
        check(layer, torch.arange(16), 16)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_deltas_larger_than_the_slice(dtype: torch.dtype) -> None:
        check(sharded_layer(dtype), torch.tensor([0, 1, -1, 2, 3, 4, 0, 5]), 8)
        check(equal_slices_layer(dtype), torch.tensor([0, 1, 2, 3]), 4)

    def test_both_orders_and_dtypes_that_differ() -> None:
        layer = qkv_layer(torch.float32)
        orders = layer.store.table[..., 7][layer.store.table[..., 2] > 0]
        assert set(orders.tolist()) == {0, 1}
        base, x = layer.arguments(5)
        slots, want = torch.tensor([0, 2, 0, 2, -1]), base.clone()
        layer.store.add_to(want, x, slots)
        out = base.bfloat16()
        triton_ops.add_kron(out, x, slots, layer.store.values, layer.store.table, layer.store.widths)
        torch.testing.assert_close(out.float(), want, rtol=1e-2, atol=2e-2)
        assert not torch.equal(out, base.bfloat16())

    def test_rows_may_be_apart() -> None:
        """Views of wider tensors, as slices of a packed projection are."""
        layer = qkv_layer(torch.float32)
        base, x = layer.arguments(5)
        slots, want = torch.tensor([0, 2, 0, 2, -1], dtype=torch.int32), base.clone()
        layer.store.add_to(want, x, slots)
        out, wide = torch.zeros(5, 300), torch.zeros(5, 100)
        out[:, 7:263], wide[:, 2:98] = base, x
        store = layer.store
        triton_ops.add_kron(out[:, 7:263], wide[:, 2:98], slots, store.values, store.table, store.widths)
        torch.testing.assert_close(out[:, 7:263], want, rtol=1e-5, atol=1e-5)
        assert not out[:, :7].any()
        assert not out[:, 263:].any()

    def test_unsupported_tensors_are_refused() -> None:
        layer = qkv_layer(torch.float32)
        base, x = layer.arguments(2)
        rest = (torch.zeros(2, dtype=torch.long), layer.store.values, layer.store.table, layer.store.widths)
        with pytest.raises(ValueError, match=r"expected x in float32, float16 or bfloat16; got torch.float64"):
            triton_ops.add_kron(base, x.double(), *rest)
        with pytest.raises(ValueError, match=r"expected contiguous rows; got strides \(1, 2\)"):
            triton_ops.add_kron(base.T.contiguous().T, x, *rest)
        with pytest.raises(ValueError, match=r"expected contiguous rows; got strides .* and \(2,\)"):
            triton_ops.add_kron(base, x, torch.zeros(4, dtype=torch.long)[::2], *rest[1:])

else:

    def test_under_the_interpreter() -> None:
        pytest.importorskip("triton")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
        command += ["-W", "ignore::DeprecationWarning"]  # the interpreter of Triton 3.6 converts arrays to scalars
        run = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
        assert " passed" in run.stdout
        assert "skipped" not in run.stdout

    @pytest.mark.slow
    def test_the_benchmark_runs_interpreted(root: Path, tmp_path: Path) -> None:
        """Its GPU mode but for the clock, the recorded graph and vLLM's kernels."""
        pytest.importorskip("triton")
        out = tmp_path / "out.json"
        options = ["--device", "interpreter", "--ranks", "2", "--tokens", "1", "--seconds", "0", "--out", str(out)]
        command = [sys.executable, "-m", "eval.bench.kernel", *options]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        subprocess.run(command, cwd=root, env=environment, capture_output=True, check=True)
        rows = json.loads(out.read_text())["rows"]
        assert [(row["dtype"], row["tokens"], row["adapters"]) for row in rows] == [
            ("float32", 1, 1),
            ("bfloat16", 1, 1),
        ]
        assert all(row["soka_us"] > 0 for row in rows)

    @pytest.mark.parametrize("capability", [80, 90, 100])
    @pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float32, "fp32")])
    @pytest.mark.parametrize("rows", [1, 1000])
    def test_compiles_for_gpus_that_are_not_here(capability: int, dtype: torch.dtype, name: str, rows: int) -> None:
        """Through ptxas; with the tensor cores, but not with wgmma, and in the shared memory that every GPU has."""
        compiler = pytest.importorskip("triton.compiler")
        target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", capability, 32)
        from soka_vllm.ops import triton_ops

        _, constants, options = triton_ops.configure(rows, dtype, dtype)
        pointers = dict.fromkeys(("out", "x", "values"), f"*{name}") | dict.fromkeys(("token_slots", "table"), "*i64")
        sizes = dict.fromkeys(("slots", "in_features", "out_stride", "x_stride"), "i32")
        source = compiler.ASTSource(
            fn=triton_ops._add_kron_kernel,
            signature=pointers | sizes | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
        )
        compiled = compiler.compile(source, target=target, options={**options, "enable_fp_fusion": True})
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 48 * 1024
        assert "wgmma" not in compiled.asm["ptx"]
        assert ("mma.sync" in compiled.asm["ptx"]) == (dtype == torch.bfloat16)
