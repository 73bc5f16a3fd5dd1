"""What a GGUF says of itself, read with the `gguf` package: architecture, types of tensors, who made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starquant.config.bits import ActivationSpec, BitsSpec, WeightSpec
from starquant.config.fields import validate_name
from starquant.errors import CheckpointError
from starquant.llama_cpp.architecture import ARCHITECTURES
from starquant.store.manifest import ManifestEntry

#: What llama.cpp calls a file by, and the bits of most of its weights (`LLAMA_FTYPE`).
FILES = {0: ("f32", 16), 1: ("f16", 16), 2: ("q4_0", 4), 3: ("q4_1", 4), 7: ("q8_0", 8), 14: ("q4_k_s", 4)} | {
    **{10: ("q2_k", 2), 11: ("q3_k_s", 3), 12: ("q3_k_m", 3), 13: ("q3_k_l", 3), 15: ("q4_k_m", 4), 32: ("bf16", 16)},
}


@dataclass(frozen=True)
class GGUFDescription:
    """What a file holds.

    Attributes:
        path: of it.
        architecture: llama.cpp's name.
        file_type: such as q4_0.
        method: what made it: starquant's method, "llama_cpp", or "llama_cpp_imatrix".
        record: digest of the run that wrote it; None where llama.cpp's own quantizer did.
        tensors: type and shape of each.
    """

    path: Path
    architecture: str
    file_type: str
    method: str
    record: str | None
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    @property
    def types(self) -> dict[str, int]:
        """How many tensors there are of each type."""
        return dict(Counter(kind for kind, _ in self.tensors.values()))

    @property
    def float_types(self) -> set[str]:
        """Types of weights that are not quantized; norms and biases, which are always float32, are none."""
        return {kind for kind, shape in self.tensors.values() if len(shape) > 1 and kind in ("F16", "BF16", "F32")}

    @property
    def bits(self) -> BitsSpec:
        """Return the bits of most linears, under the file's type; what differs is in the manifest."""
        name, width = self.file_type, {name: width for name, width in FILES.values()}[self.file_type]
        if width == 16:
            return BitsSpec(name=name, weights=WeightSpec(bits=16), activations=ActivationSpec(bits=16))
        if name in ("q4_0", "q8_0"):
            weights = WeightSpec.model_validate({"bits": width, "group_size": 32, "block": name})
            return BitsSpec(name=name, weights=weights, activations=ActivationSpec(bits=8, block="q8_0"))
        weights = WeightSpec.model_validate({"bits": width, "symmetric": False, "group_size": 32})
        return BitsSpec(name=name, weights=weights, activations=ActivationSpec(bits=8))

    def manifest(self) -> list[ManifestEntry]:
        """Return an entry for every weight, its type in words."""
        entries = []
        for name, (kind, shape) in self.tensors.items():
            if len(shape) < 2:
                continue
            role = {"token_embd.weight": "embedding", "output.weight": "head"}.get(name, "linear")
            width = next((int(digit) for digit in kind if digit.isdigit()), 16)
            entries.append(
                ManifestEntry.model_validate(
                    {
                        "name": name,
                        "kind": role,
                        "role": name.split(".")[-2],
                        "block": int(name.split(".")[1]) if name.startswith("blk.") else None,
                        "weight_bits": 16 if kind in ("F16", "BF16", "F32") else width,
                        "reason": f"as the file holds it: {kind}",
                    }
                )
            )
        return entries


def describe_gguf(path: Path) -> GGUFDescription:
    """Read what a file says of itself.

    Raises:
        CheckpointError: a file that is cut or no GGUF, of an architecture or a type that is not known here, or that
            says starquant made it and not how.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        said = {name: reader.fields[name].contents() for name in _KEYS if name in reader.fields}
        tensors = {t.name: (t.tensor_type.name, tuple(int(n) for n in t.shape[::-1])) for t in reader.tensors}
    except Exception as error:  # the package raises what comes
        raise CheckpointError(
            f"{path}: is no whole GGUF, but cut or another file: {' '.join(str(error).split())[:200]}"
        ) from None
    architecture, known = said.get("general.architecture"), [a.name for a in ARCHITECTURES.values()]
    if architecture not in known:
        raise CheckpointError(f"{path}: is of architecture {_shown(architecture)}, allowed: {', '.join(known)}")
    number = said.get("general.file_type")
    if not isinstance(number, int) or number not in FILES:
        allowed = ", ".join(name for name, _ in FILES.values())
        raise CheckpointError(f"{path}: is of file type {_shown(number)}, allowed: {allowed}")
    file_type, _ = FILES[number]
    own = said.get("starquant.bits") == file_type
    theirs = "llama_cpp_imatrix" if "quantize.imatrix.entries_count" in said else "llama_cpp"
    return GGUFDescription(
        path=path,
        architecture=str(architecture),
        file_type=file_type,
        method=_said_name(path, said, "starquant.method") if own else theirs,
        record=_said_name(path, said, "starquant.record") if own else None,
        tensors=tensors,
    )


def _said_name(path: Path, said: Mapping[str, Any], key: str) -> str:
    """Return a name that a file holds: it becomes part of a record's, so whoever made the file must not choose a path.

    Raises:
        CheckpointError: there is none, or what is no name.
    """
    name = said.get(key)
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: {key}: got {_shown(name)}, allowed: a name, beside starquant.bits")
    try:
        return validate_name(name)
    except ValueError as error:
        raise CheckpointError(f"{path}: {key}: {error}") from None


def _shown(value: Any) -> str:
    """Return what a file holds, short and on one line."""
    return "nothing" if value is None else repr(value)[:80]


_KEYS = (
    "general.architecture",
    "general.file_type",
    "starquant.bits",
    "starquant.method",
    "starquant.record",
    "quantize.imatrix.entries_count",
)


def exported_gguf(path: Path) -> str | None:
    """Return the digest of the record that a GGUF was exported with; None for any other file, or none."""
    try:
        return describe_gguf(path).record if path.is_file() else None
    except CheckpointError:
        return None
