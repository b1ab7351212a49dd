"""The compiled operator: as other CPUs run it, in several threads, and what stands in for it."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from soka_serve.io.files import is_own_file
from soka_vllm.ops import cpu_kernel, torch_ops
from tests.support.plugin_layers import Layer, equal_slices_layer, qkv_layer, sharded_layer

SOURCE, FLAGS = cpu_kernel.SOURCE.read_bytes(), cpu_kernel._FLAGS
SLOTS = torch.tensor([0, 1, 2, -1, 0, 3, 7, 2**40])


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    """`load` remembers what it found."""
    if cpu_kernel.load() is None:
        pytest.skip("no C++ compiler")
    cpu_kernel.load.cache_clear()
    yield
    cpu_kernel.load.cache_clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "soka-serve" / "kernels"


def wide_layer(dtype: torch.dtype) -> Layer:
    """More terms than are held at once, in both orders, and sides that fill no register."""
    layer = Layer(2, [86 * 32], 43 * 32, dtype)
    layer.put(0, 0, 40, (86, 43, 32, 32), seed=1)
    layer.put(1, 0, 40, (32, 32, 86, 43), seed=2)
    assert set(layer.store.table[0, :, 7].tolist()) == {0, 1}
    return layer


def even_layer(dtype: torch.dtype) -> Layer:
    """Even depths in both orders: bfloat16 takes pairs. Columns below, at and beyond registers, cut and not."""
    layer = Layer(5, [96, 62], 80, dtype)
    layer.put(0, 0, 1, (12, 10, 8, 8), seed=1)
    layer.put(0, 1, 3, (2, 2, 31, 40), seed=2)
    layer.put(1, 0, 2, (9, 8, 11, 10), seed=3)
    layer.put(1, 1, 5, (31, 40, 2, 2), seed=4)
    layer.put(2, 0, 4, (3, 2, 33, 42), seed=5, skips=(2, 4))
    layer.put(2, 1, 1, (5, 42, 13, 2), seed=6, skips=(3, 1))
    layer.put(3, 0, 2, (48, 4, 2, 20), seed=7)
    layer.put(3, 1, 7, (1, 2, 62, 40), seed=8)
    assert set(layer.store.table[:, :, 7].unique().tolist()) == {0, 1}
    return layer


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [qkv_layer, sharded_layer, equal_slices_layer, wide_layer, even_layer])
def test_it_runs_in_every_dtype_and_number_of_threads(
    make: type[Layer], dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    kernel = cpu_kernel.load()
    assert kernel is not None
    if dtype not in kernel.types:
        pytest.skip(f"this compiler does not know {dtype}")
    monkeypatch.setattr(torch_ops, "add_kron", None)  # nothing falls back to it
    layer = make(dtype)  # type: ignore[arg-type]
    for slots in (SLOTS, torch.zeros(8, dtype=torch.long), torch.arange(8)):
        layer.check(slots.repeat(10).to(torch.int32 if slots.max() < 9 else torch.int64), 77)


@pytest.mark.parametrize("make", [qkv_layer, sharded_layer, wide_layer, even_layer])
@pytest.mark.parametrize("cpu", [("-march=x86-64-v3",), ("-march=native", "-mno-avx512bf16")])
def test_cpus_with_less_compute_the_same(
    cpu: tuple[str, ...], make: type[Layer], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cpu._is_avx2_supported():
        pytest.skip("not an x86 CPU with AVX2")
    kernel = cpu_kernel.compiled(SOURCE, (*(flag for flag in FLAGS if flag != "-march=native"), *cpu))
    monkeypatch.setattr(cpu_kernel, "load", lambda: kernel)
    monkeypatch.setattr(torch_ops, "add_kron", None)
    for dtype in (torch.float32, torch.bfloat16):
        make(dtype).check(SLOTS.repeat(10), 77)  # type: ignore[call-arg, arg-type]


def test_pairs_of_bfloat16_are_multiplied_where_all_is_bfloat16_and_depths_are_even(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*cpu_kernel._compiler(), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    if "__AVX512BF16__" not in subprocess.run(command, capture_output=True, check=True, text=True).stdout:
        pytest.skip("the CPU does not multiply pairs of bfloat16, or the compiler does not know how")
    wide = cpu_kernel.compiled(SOURCE, (*FLAGS, "-mno-avx512bf16"))
    pairs = cpu_kernel.compiled(SOURCE, FLAGS)
    slots = torch.zeros(9, dtype=torch.long)

    def outcome(kernel: cpu_kernel.Kernel, layer: Layer, x_dtype: torch.dtype) -> torch.Tensor:
        monkeypatch.setattr(cpu_kernel, "load", lambda: kernel)
        base, x = layer.arguments(9)
        layer.store.add_to(base, x.to(x_dtype), slots)
        return base

    def differ(shape: tuple[int, int, int, int], x_dtype: torch.dtype = torch.bfloat16) -> bool:
        layer = Layer(1, [shape[0] * shape[2]], shape[1] * shape[3], torch.bfloat16)
        layer.put(0, 0, 2, shape, seed=1)
        return not torch.equal(outcome(wide, layer, x_dtype), outcome(pairs, layer, x_dtype))

    # What lies between the products is rounded, which shows.
    assert differ((16, 12, 8, 8))
    assert differ((8, 8, 16, 12))
    assert not differ((16, 12, 8, 8), torch.float32)
    assert not differ((16, 13, 8, 8))
    assert not differ((16, 12, 8, 7))


@pytest.mark.parametrize("make", [wide_layer, even_layer])
def test_a_result_does_not_depend_on_the_batch(make: type[Layer]) -> None:
    layer = make(torch.bfloat16)  # type: ignore[call-arg, arg-type]
    base, x = layer.arguments(60)
    slots = torch.arange(60) % 2
    whole = base.clone()
    layer.store.add_to(whole, x, slots)
    assert not torch.equal(whole, base)
    for t in range(0, 60, 7):
        alone = base[t : t + 1].clone()
        layer.store.add_to(alone, x[t : t + 1], slots[t : t + 1])
        assert torch.equal(alone[0], whole[t])


def test_values_that_are_not_finite_stay_so() -> None:
    layer = qkv_layer(torch.bfloat16)
    base, x = layer.arguments(3)
    x[1] = torch.nan
    base[2] = torch.inf
    layer.store.add_to(base, x, torch.zeros(3, dtype=torch.long))
    assert base[0].isfinite().all()
    assert base[1].isnan().all()
    assert (base[2] == torch.inf).all()


def test_it_takes_parts_of_wider_tensors() -> None:
    layer = qkv_layer(torch.float32)
    base, x = layer.arguments(9)
    slots = torch.tensor([0, 2, -1] * 3)
    want = base.clone()
    layer.store.add_to(want, x, slots)
    outs, inputs = torch.zeros(9, 300), torch.zeros(9, 100)
    outs[:, 7 : 7 + 256], inputs[:, 2:98] = base, x
    layer.store.add_to(outs[:, 7 : 7 + 256], inputs[:, 2:98], torch.stack([slots, slots], 1)[:, 0])
    assert torch.equal(outs[:, 7 : 7 + 256], want)
    assert not outs[:, :7].any()
    assert not outs[:, 263:].any()


def test_float64_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    stock = torch_ops.add_kron

    def noted(*arguments: object) -> None:
        calls.append(torch.float64)
        stock(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(torch_ops, "add_kron", noted)
    layer = qkv_layer(torch.float32)
    base, x = layer.arguments(3)
    layer.store.add_to(base.double(), x, torch.zeros(3, dtype=torch.long))
    assert calls


def test_it_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_kernel.load() is not None
    (library,) = cache.iterdir()
    written = library.stat().st_mtime_ns
    cpu_kernel.load.cache_clear()
    assert cpu_kernel.load() is not None
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [written]
    cpu_kernel.compiled(SOURCE + b"\n", FLAGS)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "another", "open", "link"])
def test_a_library_that_is_not_as_it_was_written_is_compiled_again(
    damage: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cpu_kernel.load() is not None
    (written,) = cache.iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "copy"))  # where this process has opened none
    library = Path(shutil.copytree(cache, tmp_path / "copy" / "soka-serve" / "kernels")) / written.name
    for folder in (library.parent, library.parent.parent):
        folder.chmod(0o700)
    good = library.read_bytes()
    if damage == "cut":
        replace(library, good[:100])
    elif damage == "another":
        (tmp_path / "a.cpp").write_text('extern "C" int other() { return 1; }', encoding="utf-8")
        other = tmp_path / "other.so"
        subprocess.run([*cpu_kernel._compiler(), "-shared", "-fPIC", tmp_path / "a.cpp", "-o", other], check=True)
        replace(library, other.read_bytes())
    elif damage == "open":
        library.chmod(0o777)
    else:
        library.unlink()
        library.symlink_to(torch._C.__file__)
    before = library.lstat().st_ino
    cpu_kernel.load.cache_clear()
    assert cpu_kernel.load() is not None
    assert library.lstat().st_ino != before
    assert is_own_file(library)


def replace(file: Path, content: bytes) -> None:
    """Under another inode: the old one is mapped."""
    new = file.with_name("new")
    new.write_bytes(content)
    new.chmod(0o700)
    new.replace(file)


@pytest.mark.parametrize("how", ["open", "link"])
def test_a_folder_that_others_may_write_to_is_not_loaded_from(
    how: str, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir(mode=0o700)
    if how == "open":
        cache.mkdir()
        cache.chmod(0o777)
    else:
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        cache.symlink_to(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING, "vllm.soka"):
        assert cpu_kernel.load() is None
    assert f"{cache}: other users may write there" in caplog.text
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("CXX", "no-such-compiler", "no-such-compiler"),
        ("CXX", "false", "No compiled operator"),
        ("CXX", 'c++ "-O1', "$CXX is 'c++ \"-O1': No closing quotation"),
        ("PATH", "/nowhere", "no C++ compiler: neither $CXX nor c++, g++, clang++"),
        ("SOKA_COMPILE", "0", "SOKA_COMPILE=0"),
    ],
)
def test_without_a_compiler_torch_stands_in_and_the_log_says_so(
    name: str, value: str, reason: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING, "vllm.soka"):
        qkv_layer(torch.bfloat16).check(SLOTS, 8)
        qkv_layer(torch.bfloat16).check(SLOTS, 8)
    (record,) = caplog.records
    assert reason in record.message
    assert "torch" in record.message
    assert not cache.exists() or not list(cache.iterdir())


def test_a_compilers_error_is_told(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = cache.parent.parent / "broken.cpp"
    broken.write_text("int main( {", encoding="utf-8")
    monkeypatch.setattr(cpu_kernel, "SOURCE", broken)
    with caplog.at_level(logging.WARNING, "vllm.soka"):
        assert cpu_kernel.load() is None
    assert "error" in caplog.text
    assert list(cache.iterdir()) == []
