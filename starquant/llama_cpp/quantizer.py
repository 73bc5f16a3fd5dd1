"""llama.cpp's own quantizer on a GGUF: what its users have without us, with or without an importance matrix."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starquant.errors import CheckpointError, ConfigError
from starquant.llama_cpp.engine import library, what_it_said
from starquant.llama_cpp.reading import FILES


def quantize_file(
    source: Path, target: Path, file_type: str, importance: Mapping[str, Tensor] | None = None, threads: int = 1
) -> int:
    """Let llama.cpp quantize a file as its own program does by default; returns the bytes of what it writes.

    Args:
        source: a GGUF of float32, float16 or bfloat16.
        target: new file.
        file_type: such as q4_0 or q4_k_m.
        importance: E[x^2] of what each linear reads [I], by the name of its tensor; None for none.
        threads: of the CPU.

    Raises:
        ConfigError: a file type that is not known here.
        CheckpointError: llama.cpp refuses.
    """
    numbers = {name: number for number, (name, _) in FILES.items()}
    if file_type not in numbers:
        raise ConfigError(f"file type: got '{file_type}', allowed: {', '.join(numbers)}")
    lib: Any = library()
    settings = lib.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = numbers[file_type], threads
    held = None if importance is None else _matrix(lib, importance)  # alive until it is done
    if held is not None:
        settings.imatrix = held[0]
    if lib.llama_model_quantize(str(source).encode(), str(target).encode(), settings) != 0:
        raise CheckpointError(f"{source}: llama.cpp does not quantize it: {what_it_said()}")
    return target.stat().st_size


def _matrix(lib: Any, importance: Mapping[str, Tensor]) -> tuple[Any, list[Any]]:
    """Return llama.cpp's array of names and numbers, ended by one without a name, and what it points to."""
    entries, kept = (lib.llama_model_imatrix_data * (len(importance) + 1))(), list[Any]()
    for entry, (name, values_I) in zip(entries, importance.items(), strict=False):
        numbers = values_I.to("cpu", torch.float32).contiguous().numpy()
        kept += [numbers, name.encode()]
        entry.name, entry.size = kept[-1], numbers.size
        entry.data = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries, kept
