"""Files written tensor by tensor, read by the safetensors library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from starquant.models.tensor_file import _NAMES, write_tensors


@pytest.mark.parametrize("dtype", list(_NAMES), ids=str)
def test_the_library_reads_what_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    path, numbers = tmp_path / "m.safetensors", torch.randint(0, 2, (5, 3), generator=torch.Generator().manual_seed(0))
    tensors = {
        "plain": numbers.to(dtype),
        "turned": numbers.to(dtype).T,
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
        "of bytes": torch.arange(7, dtype=torch.uint8),
        "wide": torch.arange(3, dtype=torch.float64),
    }
    write_tensors(tensors, path, {"said": '{"a": "é"}'})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    with safe_open(path, "pt") as stored:
        assert stored.metadata() == {"said": '{"a": "é"}'}


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    path, shared = tmp_path / "m.safetensors", torch.arange(6.0).reshape(2, 3)
    write_tensors({"a": shared, "b": shared[1]}, path)
    read = load_file(path)
    assert torch.equal(read["a"], shared) and torch.equal(read["b"], shared[1])
