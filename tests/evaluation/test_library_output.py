"""lm-eval says nothing of git where the current folder is no repository."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_eval import evaluator

from starquant.evaluation.library_output import labelled
from starquant.session.progress import for_terminal


def test_git_is_not_asked_for_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with labelled(for_terminal(), "task"):
        assert evaluator.get_git_commit_hash() is None
    assert capfd.readouterr().err == ""
    evaluator.get_git_commit_hash()
    assert "not a git repository" in capfd.readouterr().err
