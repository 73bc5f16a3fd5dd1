"""A page's content as one HTML file: scripts and styles inside, nothing to fetch, no text of a record as markup."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from starquant.reports.page.charts import CONFIG, vega
from starquant.reports.page.content import Content
from starquant.store.files import write_atomically

ASSETS = Path(__file__).parent / "assets"


def render(content: Content) -> str:
    """Return the page. Its policy lets no script run but the two that are in it, and lets nothing be fetched."""
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [*([vega()] if content.charts else []), (ASSETS / "page.js").read_text(encoding="utf-8")]
    data = dataclasses.asdict(content)
    return environment.get_template("page.html").render(
        content=content,
        style=Markup((ASSETS / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
        data=Markup(as_json({name: data[name] for name in ("table", "flips", "charts")} | {"config": CONFIG})),
    )


def _policy(scripts: list[str]) -> str:
    """Return a Content-Security-Policy; Vega compiles its expressions, which is what unsafe-eval stands for."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; script-src {allowed} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:"


def as_json(data: Any) -> str:
    """Return data as JSON that ends no script and opens no comment, whatever texts are in it."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write(content: Content, path: Path) -> int:
    """Write the page; returns its bytes; raises OSError."""
    text = render(content)
    write_atomically(path, text)
    return len(text.encode())
