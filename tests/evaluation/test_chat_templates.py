"""Chat templates: what a model is shown, under lm-eval, under its own command line, and in a completion."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from starquant.config.model import ModelSpec
from starquant.config.protocol import TaskProtocol
from starquant.config.samplers import LLaDASamplerSpec
from starquant.config.tasks import TasksSpec
from starquant.errors import CheckpointError, ConfigError
from starquant.evaluation.harness import evaluate
from starquant.evaluation.lm import DiffusionLM
from starquant.models import load_model, load_tokenizer
from starquant.models.tokenizer import render_chat
from starquant.packed.completion import main
from starquant.testbed.tiny.shipped import weights_folder
from tests.support.paths import GOLDEN

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</>{% endfor %}" + (
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WRITES = LLaDASamplerSpec(name="llada", steps=8, gen_length=8, block_length=8)
PROTOCOL = {
    "gsm8k": TaskProtocol(num_fewshot=2, sampler=WRITES),
    "piqa": TaskProtocol(mc_num=4),
    "humaneval": TaskProtocol(sampler=WRITES),
}


class Listener(DiffusionLM):
    """Keeps what it is shown, and says the same to everything."""

    def __init__(self, model: Any, tokenizer: Any, says: str = "7") -> None:
        super().__init__(model, tokenizer)
        self.says, self.shown = says, list[tuple[Any, ...]]()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self.shown += [request.args for request in requests]
        return [(-1.0, False) for _ in requests]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self.shown += [request.args for request in requests]
        return [self.says for _ in requests]


@pytest.fixture
def talking(tiny_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    program = {"task_id": "t/0", "prompt": "def f(x):\n", "test": "def check(f):\n    assert f(3) == 4\n"}
    files: dict[str, list[dict[str, Any]]] = {
        "gsm8k/train": [{"question": f"how many {n}", "answer": f"so\n#### {n}"} for n in range(9)],
        "gsm8k/test": [{"question": "how many 7", "answer": "so\n#### 7"}],
        "piqa/validation": [{"goal": "walk", "sol1": "with legs", "sol2": "with hats", "label": 0}],
        "humaneval/test": [program | {"entry_point": "f"}],
    }
    for name, rows in files.items():
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def scored(lm: DiffusionLM, task: str, data: Path, chat_template: str) -> Any:
    path: dict[str, Any] = {"path": "somewhere", "trajectory": WRITES, "protocol": PROTOCOL}
    model = ModelSpec(name="m", chat_template=chat_template, **path)  # type: ignore[arg-type]
    tasks = TasksSpec(name="t", names=(task,), data_dir=str(data), allow_code_execution=True)
    return evaluate(lm, model, tasks)


def test_examples_become_turns(tiny: Any, talking: Any, data: Path) -> None:
    raw, lm = Listener(tiny, talking), Listener(tiny, talking)
    scored(raw, "gsm8k", data, "none")
    scored(lm, "gsm8k", data, "auto")
    first, second = (part.strip() for part in raw.shown[0][0].split("\n\n")[:2])
    turns = []
    for part in (first, second):
        question, answer = part.removeprefix("Question: ").split("\nAnswer: ")
        turns.append(f"<user>Question: {question}\nAnswer:</><assistant>{answer}</>")
    assert lm.shown[0][0] == "".join(turns) + "<user>Question: how many 7\nAnswer:</><assistant>"
    assert (raw.templated, lm.templated) == (False, True)


def test_choices_follow_the_header_of_the_answer(tiny: Any, talking: Any, data: Path) -> None:
    lm = Listener(tiny, talking)
    scored(lm, "piqa", data, "auto")
    assert [context for context, _ in lm.shown] == 2 * ["<user>Question: walk\nAnswer:</><assistant>"]
    assert [choice.strip() for _, choice in lm.shown] == ["with legs", "with hats"]


@pytest.mark.parametrize(("says", "solved"), [("    return x + 1\n```\nThat is it.", 1.0), ("    return x", 0.0)])
def test_a_completion_becomes_a_question_with_the_answer_begun(
    tiny: Any, talking: Any, data: Path, says: str, solved: float
) -> None:
    lm = Listener(tiny, talking, says.partition("```")[0])
    [score] = scored(lm, "humaneval", data, "auto").scores
    assert (score.metric, score.value) == ("pass@1", solved)
    context, how = lm.shown[0]
    assert context.startswith("<user>Write a solution to the following problem")
    assert context.rstrip().endswith("<assistant>Here is the completed function:\n```python\ndef f(x):")
    assert "```" in how["until"]


def test_a_template_brings_its_own_special_tokens(tiny_tokenizer: Any, talking: Any) -> None:
    for tokenizer in (tiny_tokenizer, talking):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.bos_token = tokenizer.mask_token
        lm = DiffusionLM(load_model(GOLDEN / "dream_gqa"), tokenizer)  # a family that puts BOS in front
        assert lm._encode(["ada"])[0][0] == tokenizer.bos_token_id
        lm.templated = True
        assert lm._encode(["ada"]) == tokenizer(["ada"], add_special_tokens=False)["input_ids"]


def test_lm_evals_own_option_is_served(tiny: Any, tiny_tokenizer: Any, talking: Any) -> None:
    lm = DiffusionLM(tiny, talking)
    assert lm.chat_template(True) == TEMPLATE
    assert lm.templated
    assert lm.chat_template(False) == ""
    assert not lm.templated
    assert lm.apply_chat_template([{"role": "user", "content": "ada"}]) == "<user>ada</><assistant>"
    with pytest.raises(ConfigError, match="--apply_chat_template: got 'rag', allowed: no name"):
        lm.chat_template("rag")
    with pytest.raises(ConfigError, match="the checkpoint has no chat template"):
        DiffusionLM(tiny, tiny_tokenizer).chat_template(True)


def test_templates_that_cannot_be_rendered(talking: Any) -> None:
    for template in ("{% for m in messages %}", "{{ raise_exception('no') }}", "{{ messages[9].content }}"):
        talking.chat_template = template
        with pytest.raises(CheckpointError, match="its chat template cannot be rendered"):
            render_chat(talking, [{"role": "user", "content": "x"}])


def test_a_completion_of_a_conversation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(weights_folder(0), tmp_path / "m"))
    question, words = "the city of ada is", (str(folder), "--length", "8")
    assert main([*words, question, "--chat-template", "auto"]) == 2
    assert "--chat-template: got auto, but the checkpoint has no chat template" in capsys.readouterr().err
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }} , cara")
    assert main([*words, question, "--chat-template", "auto"]) == 0
    asked = capsys.readouterr().out
    assert main([*words, f"{question} , cara"]) == 0
    assert capsys.readouterr().out == asked
    assert load_tokenizer(folder).chat_template is not None
