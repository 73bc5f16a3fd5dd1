"""The lm-eval model: scores and texts belong to a request, not to its batch; what is cut, truncated and refused."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from starquant.config.protocol import TaskProtocol
from starquant.config.samplers import DreamSamplerSpec, LLaDASamplerSpec
from starquant.diffusion import MaskPredictor
from starquant.errors import ConfigError
from starquant.evaluation.lm import DiffusionLM
from starquant.models import family_of, load_model
from tests.support.paths import GOLDEN


class WordTokenizer:
    """Words to ids 0..399 of a golden model, by order of appearance, and back."""

    name_or_path, bos_token_id, eos_token_id = "words", 501, 501

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [self.encoded(text) for text in texts]}

    def encoded(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        assert len(self.words) <= 400
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return " ".join(self.words[i] if i < len(self.words) else f"#{i}" for i in ids if i < 500)


class CharacterTokenizer(WordTokenizer):
    """One token a character, spaces included."""

    def encoded(self, text: str) -> list[int]:
        return [ord(character) + 100 for character in text]


class Spy(MaskPredictor):
    """Remembers the shape [B, L] of every forward pass."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.shapes: list[tuple[int, int]] = []

    def chunks(self, ids_BL: Tensor, *args: Any, **kwargs: Any) -> Iterator[tuple[slice, Tensor]]:
        self.shapes.append(tuple(ids_BL.shape))
        return super().chunks(ids_BL, *args, **kwargs)


class Scripted(MaskPredictor):
    """Predicts given answer tokens, whatever the prompt; the answer ends the sequence."""

    def __init__(self, model: Any, answer: Sequence[int]) -> None:
        super().__init__(model)
        self.answer = torch.tensor(answer)

    def chunks(self, ids_BL: Tensor, positions: tuple[Tensor, Tensor], **_: Any) -> Iterator[tuple[slice, Tensor]]:
        wanted = self.answer[positions[1] - (ids_BL.shape[1] - len(self.answer))]
        yield slice(None), torch.nn.functional.one_hot(wanted, self.config.rows).float() * 20


LIKELIHOOD = TaskProtocol(mc_num=8)
SAME = {"abs": 1e-5, "rel": 1e-6}  # float32, scores of up to a few hundred nats
GUIDED = TaskProtocol(mc_num=8, cfg_scale=1.5)


def llada_generation(length: int = 8, **settings: Any) -> TaskProtocol:
    sizes = {"gen_length": length, "block_length": length, "steps": length}
    return TaskProtocol(sampler=LLaDASamplerSpec(name="llada", **(sizes | settings)))


def dream_generation(length: int = 8, **settings: Any) -> TaskProtocol:
    return TaskProtocol(sampler=DreamSamplerSpec(name="dream", max_new_tokens=length, steps=length, **settings))


@pytest.fixture(scope="module")
def dream():
    """The golden Dream model and a tokenizer for it."""
    return load_model(GOLDEN / "dream_gqa"), WordTokenizer()


@pytest.fixture(params=["llada", "dream"])
def pair(request: pytest.FixtureRequest, tiny, tiny_tokenizer, dream):
    """A model of each family with its tokenizer."""
    return (tiny, tiny_tokenizer) if request.param == "llada" else dream


def make_lm(pair: Any, protocol: TaskProtocol, **settings: Any) -> DiffusionLM:
    return DiffusionLM(*pair, protocol=protocol, **settings)


def loglikelihood(lm: DiffusionLM, pairs: Sequence[tuple[str, str]]) -> list[float]:
    requests = [Instance("loglikelihood", {}, arguments, i) for i, arguments in enumerate(pairs)]
    answers = lm.loglikelihood(requests, disable_tqdm=True)
    assert all(greedy is False for _, greedy in answers)
    return [value for value, _ in answers]


def generated(lm: DiffusionLM, prompts: Sequence[str], until: Any = ()) -> list[str]:
    requests = [Instance("generate_until", {}, (p, {"until": until}), i) for i, p in enumerate(prompts)]
    return lm.generate_until(requests, disable_tqdm=True)


PAIRS = [
    (context, continuation)
    for context in (
        "what is the city of ada ?",
        "describe ben by pet drink job :",
        "ada has 7 coins . then buys 3 . then loses 2 . then makes it 2 times . how many ?",
        "cara",
        "",
    )
    for continuation in (
        " oslo",
        " city oslo",
        " pet cat , drink tea , job baker",
        " 10 , 8 , 16",
        " pet dog , drink rum",
        " 1 , 2 , 3 , 4 , 5 , 6",
    )
]
PROMPTS = [
    "what is the city of ada ?",
    "ada has 7 coins . then buys 3 . then loses 2 . then makes it 2 times . how many ?",
    "f 1 = 5 ; f 2 = 8 ; f 0 = 2 ; f 7 = 23 ; f x =",
    "describe ben by pet drink job :",
    "zoe",
    "f 3 = 9 ; f 1 = 1 ; f 0 = 0 ; f 2 = 4 ; f x =",
    "walt has 12 stamps . sells 9 . then finds 4 . then gets 2 more . how many ?",
    "cara : tool =",
]


@pytest.mark.parametrize("protocol", [LIKELIHOOD, GUIDED], ids=["plain", "guided"])
def test_scores_do_not_depend_on_batch_or_order(pair, protocol: TaskProtocol) -> None:
    whole = loglikelihood(make_lm(pair, protocol, batch_size=32), PAIRS)
    assert all(value < 0 for value in whole)
    assert len({round(value, 3) for value in whole}) > len(PAIRS) // 2
    for size in (1, 3):
        assert loglikelihood(make_lm(pair, protocol, batch_size=size), PAIRS) == pytest.approx(whole, **SAME)
    order = random.Random(3).sample(range(len(PAIRS)), len(PAIRS))
    shuffled = loglikelihood(make_lm(pair, protocol, batch_size=3), [PAIRS[i] for i in order])
    assert shuffled == pytest.approx([whole[i] for i in order], **SAME)
    alone = [loglikelihood(make_lm(pair, protocol), [request])[0] for request in PAIRS[:6]]
    assert alone == pytest.approx(whole[:6], **SAME)


def test_the_seed_changes_estimates_but_not_exact_scores(pair) -> None:
    one_token, many_tokens = PAIRS[0], PAIRS[2]
    scores = [loglikelihood(make_lm(pair, LIKELIHOOD, seed=seed), [one_token, many_tokens]) for seed in (0, 1)]
    assert scores[0][0] == pytest.approx(scores[1][0], **SAME)
    assert scores[0][1] != pytest.approx(scores[1][1], **SAME)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_a_one_token_score_is_the_models_log_probability(pair, cfg_scale: float) -> None:
    model, tokenizer = pair
    context, word = "what is the city of ada ?", "oslo"
    prompt = tokenizer([context], add_special_tokens=False)["input_ids"][0]
    [[target]] = tokenizer([word], add_special_tokens=False)["input_ids"]
    mask = model.config.mask_token_id
    if model.logit_offset == 0:
        rows, column = [[*prompt, mask], [mask] * (len(prompt) + 1)], len(prompt)
    else:  # Dream: text begins with its bos, ends with its eos, and the hidden state before predicts
        rows = [[501, *prompt, mask, 501], [mask] * (len(prompt) + 2) + [501]]
        column = len(prompt)
    with torch.inference_mode():
        conditional, unconditional = model(torch.tensor(rows)).logits[:, column].double()
    logits = unconditional + (1 + cfg_scale) * (conditional - unconditional)
    wanted = logits.log_softmax(0)[target].item()
    lm = make_lm(pair, TaskProtocol(mc_num=16, cfg_scale=cfg_scale))
    assert loglikelihood(lm, [(context, f" {word}")]) == pytest.approx([wanted], abs=1e-4)


@pytest.mark.parametrize("mc_num", [1, 2, 128])
def test_one_token_continuations_cost_one_row_each(pair, mc_num: int) -> None:
    lm = make_lm(pair, TaskProtocol(mc_num=mc_num), batch_size=4)
    lm.predict = spy = Spy(pair[0])
    contexts = [f"what is the city of {person} ?" for person in "ada ben cara dan eva finn gina hugo iris jack".split()]
    loglikelihood(lm, [(context, " oslo") for context in contexts])
    assert sum(rows for rows, _ in spy.shapes) == len(contexts)
    assert len(spy.shapes) == 3  # 4 + 4 + 2


def test_choices_of_one_token_share_a_row(pair) -> None:
    lm = make_lm(pair, TaskProtocol(mc_num=16))
    lm.predict = spy = Spy(pair[0])
    asked = [("what is the city of ada ?", f" {city}") for city in "oslo paris rome cairo lima tokyo".split()]
    together = loglikelihood(lm, asked)
    assert [rows for rows, _ in spy.shapes] == [1]
    alone = [loglikelihood(make_lm(pair, LIKELIHOOD), [request])[0] for request in asked]
    assert together == pytest.approx(alone, **SAME)


@pytest.mark.parametrize("length", [2, 3, 8])
def test_no_more_rows_are_run_than_patterns_exist(pair, length: int) -> None:
    lm = make_lm(pair, TaskProtocol(mc_num=16))
    lm.predict = spy = Spy(pair[0])
    loglikelihood(lm, [("cara", " " + " ".join(map(str, range(length))))])
    rows = sum(rows for rows, _ in spy.shapes)
    assert rows == 2**length - 1 if length <= 4 else rows <= 16


def test_repeated_requests_are_run_once(pair) -> None:
    lm = make_lm(pair, LIKELIHOOD)
    lm.predict = spy = Spy(pair[0])
    scores = loglikelihood(lm, 5 * [PAIRS[0]])
    assert len(set(scores)) == 1
    assert [rows for rows, _ in spy.shapes] == [1]


def test_repeated_prompts_are_generated_once(tiny, tiny_tokenizer) -> None:
    lm = make_lm((tiny, tiny_tokenizer), llada_generation(4))
    lm.predict = spy = Spy(tiny)
    texts = generated(lm, ["ada", "ben", "ada", "ada"])
    assert texts[0] == texts[2] == texts[3]
    assert {rows for rows, _ in spy.shapes} == {2}


def test_an_empty_continuation_scores_zero(pair) -> None:
    assert loglikelihood(make_lm(pair, LIKELIHOOD), [("cara", ""), ("cara ", ""), ("", "")]) == [0.0, 0.0, 0.0]
    mixed = loglikelihood(make_lm(pair, LIKELIHOOD), [("cara", ""), PAIRS[0]])
    assert mixed[0] == 0.0
    assert mixed[1] == pytest.approx(loglikelihood(make_lm(pair, LIKELIHOOD), [PAIRS[0]])[0], **SAME)


def test_trailing_spaces_of_a_context_belong_to_the_continuation(pair) -> None:
    model, mc_num = pair[0], 2**3 - 1  # three tokens are exact, four are not
    lm = make_lm((model, CharacterTokenizer()), TaskProtocol(mc_num=mc_num))
    apart, moved, untouched = loglikelihood(lm, [("b  ", "c"), ("b", "  c"), ("  b", "c")])
    assert apart == moved != untouched
    lm.predict = spy = Spy(model)
    loglikelihood(lm, [("d  ", "c")])
    assert sum(rows for rows, _ in spy.shapes) == mc_num


@pytest.mark.parametrize("excess", [1, 500])
def test_a_long_context_loses_its_beginning(tiny, tiny_tokenizer, excess: int) -> None:
    room = tiny.config.context_length - 3
    words = ["apples", "ada", "7", "tea", "oslo", "red", "x"] * 200
    long, short = words[: room + excess], words[excess : room + excess]
    lm = make_lm((tiny, tiny_tokenizer), TaskProtocol(mc_num=4), batch_size=4)
    lm.predict = spy = Spy(tiny)
    scores = loglikelihood(lm, [(" ".join(long), " city oslo ,"), (" ".join(short), " city oslo ,")])
    assert max(width for _, width in spy.shapes) == tiny.config.context_length
    assert scores[0] == pytest.approx(scores[1], **SAME)
    other = loglikelihood(lm, [(" ".join([*short[:-1], "frog"]), " city oslo ,")])
    assert scores[0] != pytest.approx(other[0], **SAME)


def test_long_contexts_and_continuations_fit_either_family(pair) -> None:
    many = " ".join(["ada", "ben", "oslo"] * 200)
    lm = make_lm(pair, TaskProtocol(mc_num=2), batch_size=4)
    lm.predict = spy = Spy(pair[0])
    scores = loglikelihood(lm, [(many, " oslo"), ("ada", " " + many), (many, " " + many)])
    assert all(value < 0 for value in scores)
    assert max(width for _, width in spy.shapes) == pair[0].config.context_length


@pytest.mark.parametrize("excess", [1, 300])
def test_a_long_prompt_loses_its_beginning(tiny, tiny_tokenizer, excess: int) -> None:
    room = tiny.config.context_length - 8
    words = ["apples", "ada", "7", "tea", "oslo", "red", "x"] * 200
    lm = make_lm((tiny, tiny_tokenizer), llada_generation())
    lm.predict = spy = Spy(tiny)
    long, short = generated(lm, [" ".join(words[: room + excess]), " ".join(words[excess : room + excess])])
    assert long == short
    assert max(width for _, width in spy.shapes) == tiny.config.context_length


def test_an_answer_longer_than_the_context_is_refused(tiny, tiny_tokenizer) -> None:
    with pytest.raises(ConfigError, match="256 tokens do not fit"):
        generated(make_lm((tiny, tiny_tokenizer), llada_generation(256, steps=1)), ["ada"])


GENERATION = {
    "llada greedy": llada_generation(),
    "llada blocks": llada_generation(12, block_length=4, steps=6),
    "llada guided": llada_generation(cfg_scale=1.0),
    "llada warm": llada_generation(temperature=0.8),
    "llada random": llada_generation(remasking="random"),
    "llada warm random": llada_generation(remasking="random", temperature=0.8),
    "dream entropy": dream_generation(),
    "dream few steps": dream_generation(12),
    "dream warm": dream_generation(temperature=0.8, top_p=0.95),
    "dream origin": dream_generation(alg="origin", temperature=0.8),
    "dream positions": dream_generation(alg="maskgit_plus", alg_temp=0.5, temperature=0.8),
}


@pytest.mark.parametrize("name", GENERATION)
def test_texts_do_not_depend_on_the_batch(tiny, tiny_tokenizer, dream, name: str) -> None:
    pair = dream if name.startswith("dream") else (tiny, tiny_tokenizer)
    alone = generated(make_lm(pair, GENERATION[name], batch_size=1), PROMPTS)
    assert len(set(alone)) > 2
    for size in (3, 8):
        assert generated(make_lm(pair, GENERATION[name], batch_size=size), PROMPTS) == alone
    backwards = generated(make_lm(pair, GENERATION[name], batch_size=3), PROMPTS[::-1])
    assert backwards == alone[::-1]


def test_an_empty_prompt_is_answered_and_disturbs_nobody(pair) -> None:
    # A LLaDA sequence of masks only has the same state everywhere: its own text hangs on rounding, others' must not.
    protocol = llada_generation() if family_of(pair[0]).name == "llada" else dream_generation()
    [alone] = generated(make_lm(pair, protocol), [""])
    assert isinstance(alone, str)
    with_others = generated(make_lm(pair, protocol), ["", *PROMPTS])
    assert with_others[1:] == generated(make_lm(pair, protocol), PROMPTS)


@pytest.mark.parametrize("name", ["llada warm", "llada random", "dream warm", "dream origin"])
def test_the_seed_decides_random_texts(tiny, tiny_tokenizer, dream, name: str) -> None:
    make, pair = (dream_generation, dream) if name.startswith("dream") else (llada_generation, (tiny, tiny_tokenizer))
    settings = {"llada random": {"remasking": "random"}, "dream origin": {"alg": "origin"}}.get(name, {})
    protocol = make(temperature=4.0, **settings)
    first, again, other = (generated(make_lm(pair, protocol, seed=seed), PROMPTS) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_guidance_changes_texts_and_scores(tiny, tiny_tokenizer) -> None:
    pair = (tiny, tiny_tokenizer)
    plain, guided = (loglikelihood(make_lm(pair, protocol), PAIRS) for protocol in (LIKELIHOOD, GUIDED))
    assert plain != pytest.approx(guided, abs=1e-3)
    lm = make_lm(pair, llada_generation(cfg_scale=1.0))
    lm.predict = Scripted(tiny, [7] * 8)  # takes the guidance arguments and ignores them
    assert generated(lm, ["ada"]) == [" ".join(["4"] * 8)]


def _scripted(tiny, tokenizer, answer: str, until: Any, prompts: Sequence[str] = ("ada",)) -> list[str]:
    [ids] = tokenizer([answer], add_special_tokens=False)["input_ids"]
    lm = make_lm((tiny, tokenizer), llada_generation(len(ids)))
    lm.predict = Scripted(tiny, ids)
    return generated(lm, prompts, until)


@pytest.mark.parametrize(
    ("until", "text"),
    [
        ([], "2 * x + 1 ; f x"),
        (None, "2 * x + 1 ; f x"),
        ([";"], "2 * x + 1 "),
        (";", "2 * x + 1 "),
        (["f", "+", ";"], "2 * x "),
        (["+", "f"], "2 * x "),
        ("x + 1", "2 * "),
        (["never", ""], "2 * x + 1 ; f x"),
        ("2", ""),
    ],
)
def test_texts_end_at_the_first_stop_string(tiny, tiny_tokenizer, until: Any, text: str) -> None:
    assert _scripted(tiny, tiny_tokenizer, "2 * x + 1 ; f x", until) == [text]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("10 , 8 , 16 <eos> <eos> <eos>", "10 , 8 , 16"),
        ("10 <eos> 8 , 16", "10"),
        ("<eos> 10 , 8", ""),
        ("10 , 8", "10 , 8"),
    ],
)
def test_texts_end_at_end_of_text(tiny, tiny_tokenizer, answer: str, text: str) -> None:
    assert _scripted(tiny, tiny_tokenizer, answer, [], ["ada", "what is the city of ada ?", ""]) == [text] * 3


def test_end_of_turn_ends_a_text_too(tiny, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.config, "eot_token_id", tiny_tokenizer.convert_tokens_to_ids(";"))
    assert _scripted(tiny, tiny_tokenizer, "2 * x ; f x", []) == ["2 * x"]


def test_stop_strings_belong_to_their_request(tiny, tiny_tokenizer) -> None:
    ids = tiny_tokenizer("1 + 2 ; 3", add_special_tokens=False)["input_ids"]
    lm = make_lm((tiny, tiny_tokenizer), llada_generation(len(ids)))
    lm.predict = Scripted(tiny, ids)
    stops = [{"until": [";"]}, {"until": ["+"]}, {}]
    texts = lm.generate_until([Instance("generate_until", {}, ("ada", stop), i) for i, stop in enumerate(stops)])
    assert texts == ["1 + 2 ", "1 ", "1 + 2 ; 3"]


def test_the_other_familys_sampler_is_refused(tiny, tiny_tokenizer, dream) -> None:
    with pytest.raises(ConfigError, match=r"model\.protocol: sampler 'dream'"):
        generated(make_lm((tiny, tiny_tokenizer), dream_generation()), ["ada"])
    with pytest.raises(ConfigError, match=r"model\.protocol: sampler 'llada'"):
        generated(make_lm(dream, llada_generation()), ["ada"])


def test_a_protocol_of_the_other_kind_is_refused(tiny, tiny_tokenizer) -> None:
    pair = (tiny, tiny_tokenizer)
    for protocol in (llada_generation(), None):
        with pytest.raises(ConfigError, match="likelihood task needs mc_num"):
            loglikelihood(make_lm(pair, protocol), PAIRS)
    for protocol in (LIKELIHOOD, None):
        with pytest.raises(ConfigError, match="generation task needs sampler"):
            generated(make_lm(pair, protocol), PROMPTS)


def test_perplexity_is_refused(tiny, tiny_tokenizer) -> None:
    lm = make_lm((tiny, tiny_tokenizer), LIKELIHOOD)
    with pytest.raises(ConfigError, match="loglikelihood_rolling"):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("ada",), 0)])
