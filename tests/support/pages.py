"""Records for pages: three rows of two models' seeds, with answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from starquant.reports.page.content import Content, content_of
from starquant.reports.selection import Results
from starquant.store.record import Score
from tests.support.records import edit_record, write_record

FACTS = "testbed_facts"
BASE = ("tasks.names=[testbed_facts]", "fidelity=none")
#: What would run, were it taken for markup.
HOSTILE = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'>&amp;\u2028"


def answered(values: list[float], answers: list[str]) -> list[dict[str, Any]]:
    """Items of a generation task, in the form that runs leave."""
    return [
        {"doc_id": i, "target": f"t{i}", "resps": [[answer]], "filtered_resps": [answer], "filter": "none"}
        | {"metrics": ["acc"], "doc_hash": f"h{i}", "acc": value}
        for i, (value, answer) in enumerate(zip(values, answers, strict=True))
    ]


def put(folder: Path, values: list[float], *words: str, answers: list[str] | None = None, **more: Any) -> Path:
    """Write a record of one task; its answers are a letter an item unless they are named."""
    items = {FACTS: answered(values, answers or [chr(97 + i) for i in range(len(values))]), **more.pop("items", {})}
    path = write_record(folder, items, *BASE, *words, scores=more.pop("scores", ()))
    return edit_record(path, lambda data: data["provenance"].update(git_dirty=False))


def fill(folder: Path, hostile: str = "") -> Path:
    """Write three rows, over two models' seeds; returns the record whose texts are hostile."""
    for seed in (0, 1):
        put(folder, [1.0, 1.0, 1.0, 0.0], "method=none", "bits=w16a16", f"model.seed={seed}")
        put(folder, [1.0, 1.0, 0.0, 0.0], "method=gptq", "bits=w4a4", f"model.seed={seed}")
    answers = ["b", f"b{hostile}", "c", "z"]
    path = put(folder, [0.0, 0.0, 1.0, 0.0], "method=rtn", "bits=w4a4", answers=answers)
    put(folder, [0.0, 1.0, 0.0, 1.0], "method=rtn", "bits=w4a4", "model.seed=1")
    return path


def content(folder: Path, **more: Any) -> Content:
    """What a page shows of a folder."""
    return content_of(Results(folder), **more)


def score_of_bin(metric: str, name: str, value: float) -> Score:
    """A score of fidelity at a bin of mask ratios."""
    named = {"task": "fidelity", "metric": metric, "filter": name, "value": value, "stderr": 0.1, "n": 4}
    ends = {"ci_low": value / 2, "ci_high": value * 2}
    return Score(**named, **ends, higher_is_better=None, task_version="1", num_fewshot=None)


def data_of(page: str) -> dict[str, Any]:
    """The data inside a page."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return dict(json.loads(text))
