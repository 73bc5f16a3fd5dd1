"""A hub that cannot be used says where its files are kept, if they cannot be kept there; no retry says anything."""

from __future__ import annotations

import logging
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from starquant.errors import CheckpointError
from starquant.models.hub import cache_fault, silent_retries
from starquant.models.loading import resolve_folder


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("~/.cache/huggingface/hub", "HF_HOME: not set, and no home folder is known; set it to a folder"),
        ("/dev/null/x/hub", "/dev/null/x/hub cannot be written; set HF_HOME to a folder that can"),
    ],
)
def test_a_cache_that_takes_nothing_is_named(folder: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*_: object, **__: object) -> str:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", homeless)
    with pytest.raises(CheckpointError) as caught:
        resolve_folder("owner/name")
    assert str(caught.value).endswith(f". {says}") and len(str(caught.value).splitlines()) == 1


def test_nothing_is_said_of_a_cache_that_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "deep" / "hub"))
    assert cache_fault() == ""
    assert not (tmp_path / "deep").exists()


def test_retries_are_silent_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("huggingface_hub.utils")
    with silent_retries():
        logger.warning("Retrying in 1s")
    assert not caplog.records
    logger.warning("of another matter")
    assert [record.message for record in caplog.records] == ["of another matter"]
