"""llama.cpp through llama-cpp-python's low-level functions: a model's logits of one sequence.

Attention is computed in float32 (no flash attention, which would round keys and values to float16); everything else is
llama.cpp's own arithmetic: inputs of a linear are rounded to what its weight's type asks for.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from starquant.config.gguf_bits import INSTALL
from starquant.errors import CheckpointError, ConfigError


@cache
def library() -> ModuleType:
    """Return llama-cpp-python, silent.

    Raises:
        ConfigError: it is not installed, or cannot be loaded.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(f"model.engine: got llama_cpp, which cannot be loaded ({error}); {INSTALL}") from None
    _quiet(llama_cpp)
    llama_cpp.llama_backend_init()
    module: ModuleType = llama_cpp
    return module


#: What llama.cpp said last, for errors; the callback must outlive the library.
_said: list[str] = []


def _quiet(module: Any) -> None:
    @module.llama_log_callback
    def hear(level: int, text: bytes, _: Any) -> None:
        if level >= 3:  # warnings, errors
            _said.append(text.decode("utf-8", "replace").strip())
            del _said[:-20]

    module.llama_log_set(hear, ctypes.c_void_p(0))
    module.starquant_keeps = hear


def what_it_said() -> str:
    """Return the library's last warnings in one line."""
    return " ".join(" / ".join(_said[-4:]).split())[:400]


class Engine:
    """A model that llama.cpp has loaded.

    Args:
        path: of the GGUF.
        context: longest sequence, in tokens.
        threads: of the CPU; None leaves torch's number.
        repack: let llama.cpp lay weights out anew for the processor, as its programs do: faster; scores leave it off.

    Attributes:
        vocabulary: logits of a position.

    Raises:
        CheckpointError: a file that llama.cpp does not load, or that is of no diffusion model.
    """

    def __init__(self, path: Path, context: int, threads: int | None = None, repack: bool = False) -> None:
        self._model = self._ctx = None  # `close` is called also where nothing was loaded
        self._lib: Any = library()
        self.path, self.context = path, context
        del _said[:]
        settings = self._lib.llama_model_default_params()
        settings.n_gpu_layers, settings.use_extra_bufts = 0, repack
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise CheckpointError(f"{path}: llama.cpp does not load it: {what_it_said() or 'it does not say why'}")
        if not self._lib.llama_model_is_diffusion(self._model):
            raise CheckpointError(f"{path}: is of no masked-diffusion model; allowed: architectures llada, dream")
        self.vocabulary = int(self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model)))
        self._ctx = self._new_context(threads or torch.get_num_threads())

    def _new_context(self, threads: int) -> Any:
        settings = self._lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = self.context
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = 0
        settings.n_seq_max = 1
        settings.no_perf = True
        context = self._lib.llama_init_from_model(self._model, settings)
        if not context:
            raise CheckpointError(f"{self.path}: no room for {self.context} tokens: {what_it_said()}")
        self._lib.llama_set_causal_attn(context, False)
        return context

    def logits(self, ids_L: Tensor) -> Tensor:
        """Return the logits of every position of one sequence, [L, V] in float32.

        Raises:
            ValueError: more tokens than the context holds, or none.
            CheckpointError: llama.cpp gives none.
        """
        length = len(ids_L)
        if not 0 < length <= self.context:
            raise ValueError(f"got {length} tokens, allowed: 1 to {self.context}")
        batch = self._lib.llama_batch_init(length, 0, 1)
        try:
            batch.n_tokens = length
            for place, index in enumerate(ids_L.tolist()):
                batch.token[place], batch.pos[place], batch.logits[place] = index, place, 1
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = 0
            if (memory := self._lib.llama_get_memory(self._ctx)) is not None:
                self._lib.llama_memory_clear(memory, True)
            if self._lib.llama_encode(self._ctx, batch) != 0:
                raise CheckpointError(f"{self.path}: llama.cpp cannot run it: {what_it_said()}")
            numbers = self._lib.llama_get_logits(self._ctx)
            size = length * self.vocabulary
            view = (ctypes.c_float * size).from_address(ctypes.addressof(numbers.contents))
            return torch.frombuffer(view, dtype=torch.float32).view(length, self.vocabulary).clone()
        finally:
            self._lib.llama_batch_free(batch)

    def metadata(self, key: str) -> str | None:
        """Return a key of the file as text; None where it has none."""
        buffer = ctypes.create_string_buffer(4096)
        size = self._lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return None if size < 0 else buffer.value.decode("utf-8", "replace")

    def close(self) -> None:
        """Give the memory back."""
        if self._ctx:
            self._lib.llama_free(self._ctx)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._ctx = self._model = None

    def __del__(self) -> None:
        if sys is not None and not sys.is_finalizing():  # else the library may be gone
            self.close()
