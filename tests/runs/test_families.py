"""The path of the 8B models, end to end on small random checkpoints of both families and local task files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from starquant.models.dream import DreamConfig, DreamModel
from starquant.models.llada import LLaDAConfig, LLaDAModelLM
from starquant.models.sdar import SDARConfig, SDARForCausalLM
from starquant.runs.execute import execute
from tests.support.specs import spec

WORDS = "Question: Answer: what is the sum of one two three four and #### red blue green . ?".split()
SPECIAL = {"mask_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}


def make_checkpoint(folder: Path, family: str) -> Path:
    """Write random weights and a word-level tokenizer in the published layout."""
    vocabulary = {w: i for i, w in enumerate(["<eos>", "<mask>", "<unk>", "<bos>", *WORDS, *map(str, range(10))])}
    if family == "llada":
        sizes = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 96}
        model = LLaDAModelLM(LLaDAConfig(**sizes, vocab_size=len(vocabulary), **SPECIAL))
    elif family == "sdar_4b":
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "head_dim": 16}
        model = SDARForCausalLM(SDARConfig(**sizes, vocab_size=len(vocabulary), **SPECIAL))
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = DreamConfig(**sizes, num_key_value_heads=2, vocab_size=len(vocabulary), bos_token_id=3, **SPECIAL)
        model = DreamModel(config)
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {
        "eos_token": "<eos>",
        "pad_token": "<eos>",
        "mask_token": "<mask>",
        "unk_token": "<unk>",
        "bos_token": "<bos>",
    }
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}Answer: "
    names["chat_template"] = template
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def make_data(folder: Path) -> Path:
    """Write a few items of a likelihood and of a generation task."""
    piqa = [
        {"goal": f"what is {n} ?", "sol1": "red blue", "sol2": "green . two three", "label": n % 2} for n in range(6)
    ]
    gsm8k = [{"question": f"what is the sum of {n} and 2 ?", "answer": f"one two\n#### {n + 2}"} for n in range(10)]
    winogrande = [
        {"sentence": f"red _ blue {n} .", "option1": "one", "option2": "two", "answer": str(1 + n % 2)}
        for n in range(9)
    ]
    files = {"piqa/validation": piqa, "gsm8k/train": gsm8k, "gsm8k/test": gsm8k, "winogrande/train": winogrande}
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("family", "short_answers"),
    [
        ("llada", ["gen_length=16", "steps=8", "block_length=8"]),
        ("llada_1_5", ["gen_length=16", "steps=8", "block_length=8"]),
        ("dream", ["max_new_tokens=16", "steps=8"]),
        ("sdar_4b", ["gen_length=16", "steps_per_block=4"]),
    ],
)
def test_checkpoint_to_record(tmp_path: Path, family: str, short_answers: list[str]) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "llada" if family.startswith("llada") else family)
    overrides = [
        f"model={family}", f"model.path={checkpoint}", "bits=w4a4", "model.dtype=float32", f"paths.results={tmp_path}",
        "tasks.names=[piqa,gsm8k]", f"tasks.data_dir={make_data(tmp_path / 'data')}", "model.protocol.piqa.mc_num=4",
        *(f"model.protocol.gsm8k.sampler.{setting}" for setting in short_answers),
        *(f"model.trajectory.{setting}" for setting in short_answers),
        "method=dllmquant_plus_plus", "calibration.source.segments=4", "calibration.source.length=8",
        "fidelity.source.segments=3", "fidelity.source.length=16",
    ]  # fmt: skip
    result = execute(spec(*overrides))
    found = {(s.task, s.metric, s.filter) for s in result.record.scores}
    fidelity = {key for key in found if key[0] == "fidelity"}
    assert ("fidelity", "kl", "all") in fidelity
    assert found - fidelity == {
        ("piqa", "acc", "none"),
        ("piqa", "acc_norm", "none"),
        ("gsm8k", "exact_match", "strict-match"),
        ("gsm8k", "exact_match", "flexible-extract"),
    }
    assert {s.num_fewshot for s in result.record.scores if s.task == "gsm8k"} == {
        {"dream": 8, "sdar_4b": 0}.get(family, 5)
    }
    assert sum(e.kind == "linear" and e.weight_bits == 4 for e in result.record.manifest) == 14
    assert result.record.spec["model"]["fingerprint"]
    assert result.record.spec["model"]["chat_template"] == ("auto" if family in ("llada_1_5", "sdar_4b") else "none")
    calibration = result.record.calibration
    assert (calibration["source"], calibration["segments"]) == ("winogrande", 4)
    assert result.record.spec["calibration"]["fingerprint"] == calibration["fingerprint"]
    assert result.baseline.calibration is None


def test_moving_inputs_keeps_the_digest_and_changing_them_does_not(tmp_path: Path) -> None:
    from starquant.runs.inputs import pin

    def digest(checkpoint: Path, data: Path) -> str:
        paths = (f"model.path={checkpoint}", f"tasks.data_dir={data}")
        few = ("method=gptq", "fidelity.source.segments=3")
        return pin(spec("model=llada", "tasks.names=[piqa]", *few, *paths)).spec.digest()

    checkpoint, data = make_checkpoint(tmp_path / "a", "llada"), make_data(tmp_path / "d")
    first = digest(checkpoint, data)
    assert digest(checkpoint.rename(tmp_path / "b"), data.rename(tmp_path / "e")) == first
    make_checkpoint(tmp_path / "c", "llada")  # other random weights
    assert digest(tmp_path / "c", tmp_path / "e") != first
    (tmp_path / "e" / "piqa" / "validation.jsonl").write_text(
        json.dumps({"goal": "g", "sol1": "a", "sol2": "b", "label": 0}) + "\n"
    )
    assert digest(tmp_path / "b", tmp_path / "e") != first
