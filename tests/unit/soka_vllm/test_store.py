"""The adapters that a worker keeps."""

from __future__ import annotations

import pytest
import torch

from soka_vllm.store import bytes_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_tensor_do_not_depend_on_its_strides(dtype: torch.dtype) -> None:
    value = torch.arange(1, 7).reshape(2, 3).to(dtype)
    for tensor in (value, value.T, value.T[:, :1], value[:, 1:2], value[1:, :1].T, value[:0]):
        plain = torch.tensor(tensor.flatten().tolist(), dtype=dtype)
        assert bytes(bytes_of(tensor)) == bytes(plain.view(torch.uint8).numpy())
