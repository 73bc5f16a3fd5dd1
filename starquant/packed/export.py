"""A quantized model as a folder that `from_pretrained` loads: packed weights, transforms, tokenizer, model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError

from starquant.config.bits import in_words
from starquant.errors import ConfigError
from starquant.models.base import MaskedDiffusionModel
from starquant.models.checkpoint import CONFIG, read_json
from starquant.models.loading import load_tokenizer
from starquant.models.tokenizer import has_tokenizer
from starquant.packed.description import describe
from starquant.packed.plugin import METHOD, VERSION
from starquant.quantized.tables import is_tied
from starquant.store.exports import unfinished, validate_target, write_listing
from starquant.store.record import RunRecord

#: Files of a checkpoint folder that a tokenizer may need.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
#: What transformers writes of how it was loaded, and of code that is not there.
_OF_THIS_MACHINE = ("auto_map", "is_local", "local_files_only", "name_or_path")


def export(model: MaskedDiffusionModel, record: RunRecord, source: Path, target: Path, shard_size: str = "1GB") -> int:
    """Write a packed model; the folder appears last and whole.

    Args:
        model: quantized with `packed`.
        record: of the run, for the model card.
        source: checkpoint folder, whose tokenizer is copied.
        target: new folder.
        shard_size: of a safetensors file, at most.

    Returns:
        Bytes of the weight files.

    Raises:
        ConfigError: the target is there already, or cannot be written.
    """
    validate_target(target)
    try:
        with unfinished(target) as work:
            save_torch_state_dict(_tensors(model), work, max_shard_size=shard_size)
            (work / CONFIG).write_text(
                json.dumps(_config(model, record, shard_size), indent=1) + "\n", encoding="utf-8"
            )
            _copy_tokenizer(source, work)
            size = sum(path.stat().st_size for path in work.glob("*.safetensors"))
            (work / "README.md").write_text(_card(record, target.name, size), encoding="utf-8")
            write_listing(work)
            for path in work.iterdir():
                path.chmod(0o644)  # safetensors writes for the owner alone
            work.chmod(0o755)
            if target.exists():
                target.rmdir()
            work.rename(target)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"export.dir: {target}: cannot be written: {error}") from error
    return size


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files; one that AutoTokenizer would run code for is written as the class that is read here."""
    config, path = {}, source / "tokenizer_config.json"
    if path.exists():
        config = read_json(path)
    own_code = "auto_map" in config or not hasattr(transformers, str(config.get("tokenizer_class")))
    if not (own_code and has_tokenizer(source)):
        for name in TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, target / name)
        return
    load_tokenizer(source).save_pretrained(target)
    written = target / path.name
    kept = {key: value for key, value in read_json(written).items() if key not in _OF_THIS_MACHINE}
    written.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tensors(model: MaskedDiffusionModel) -> dict[str, torch.Tensor]:
    """Return the state dict with every tensor in memory of its own; a tied head is left out."""
    trunk = model.trunk()
    tied = trunk.head is not None and is_tied(model)
    names = {module: name for name, module in model.named_modules()}
    left_out = {f"{names[trunk.head]}.weight"} if tied and trunk.head is not None else set()
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    parts = {} if model.stored_blocks is None else model.stored_blocks.parts
    for index, part in parts.items():  # mapped from their files
        prefix = model.block_name(index) + "."
        state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        state |= {prefix + name: tensor for name, tensor in part.tensors().items()}
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.data_ptr() in seen or not tensor.is_contiguous():
            state[name] = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.data_ptr())
    return state


def _config(model: MaskedDiffusionModel, record: RunRecord, shard_size: str) -> dict[str, Any]:
    spec = record.spec
    made_by = {"method": spec["method"], "record": record.digest, "model": spec["model"]["path"], "seed": spec["seed"]}
    made_by["shard_size"] = shard_size
    made_by["chat_template"] = spec["model"].get("chat_template", "none")
    packed = {"quant_method": METHOD, "version": VERSION, "bits": spec["bits"], "modules": describe(model)}
    dropped = ("quantization_config", "_name_or_path")  # the latter is a path of this machine
    config = {key: value for key, value in model.config.to_dict().items() if key not in dropped}
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")  # of what is not packed
    config["architectures"] = [type(model).__name__]  # by which families of one model_type are told apart
    return config | {"quantization_config": packed | {"made_by": made_by}}


def _card(record: RunRecord, name: str, size: int) -> str:
    spec = record.spec
    rows = [
        f"| {score.task} | {score.metric} ({score.filter}) | {100 * score.value:.2f} | {score.n} |"
        for score in record.scores
        if score.task in spec["tasks"]["names"] and score.unit == "fraction"
    ]
    chat = " Prompts were in its chat template." if spec["model"].get("chat_template") == "auto" else ""
    base = spec["model"]["path"] or f"starquant's embedded model {spec['model']['seed']}"
    how = f"{spec['method']['name']}, {in_words(spec['bits'])}"
    sha, device = record.provenance.get("git_sha"), record.provenance.get("device_name")
    return "\n".join(
        [
            f"# {name}",
            "",
            f"{base}, quantized by starquant: {how}; {size / 1e6:,.1f} MB.{chat}",
            "",
            "```python",
            "import starquant.packed",
            "from transformers import AutoModel",
            f'model = AutoModel.from_pretrained("{name}")',
            "```",
            "",
            f'`starquant generate {name} "..."` prints a completion.',
            "",
            *(["| task | metric | % | items |", "|---|---|---|---|", *rows, ""] if rows else []),
            f"Record {record.digest}, code {sha[:12] if sha else 'not under git'}, device {device}.",
            "",
        ]
    )
