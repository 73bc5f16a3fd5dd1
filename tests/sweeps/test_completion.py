"""What a shell completes: bash is driven as a person's TAB would, the other scripts are read by their shells."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from starquant.commands import COMMANDS
from starquant.sweeps.command_line import plan_of
from starquant.sweeps.completion import SHELLS, flattened, keys, main, script

DRIVEN = """
source {script}
COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; COMP_WORDBREAKS=$' \\t\\n"\\'><=;|&(:'
_starquant 2> /dev/null; printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        (folder / shell).write_text(script(shell, [*COMMANDS]))
    return folder


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("starquant stat", ["status"]),
        (
            "starquant run method=quarot",
            ["quarot", "quarot_folded", "quarot_rtn"],
        ),  # behind the = that bash breaks words at
        ("starquant run bits=w4a4 method.tac.bl", ["method.tac.block_size="]),
        ("starquant method=rtn bits=w3", ["w3a3"]),
        ("starquant tables table3", ["table3_tac_block_size"]),
        ("starquant status smol", ["smol_calibration", "smol_main"]),
        ("starquant generate ti", ["tiny", "tiny_llada_moe", "tiny_sdar"]),
        ("starquant completion z", ["zsh"]),
        ("starquant run nothing_begins_so", [""]),
    ],
)
def test_bash_completes(line: str, replies: list[str], scripts: Path) -> None:
    code = DRIVEN.format(script=scripts / "bash", line=line)
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines() == replies, done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_reads_its_script(shell: str, scripts: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    done = subprocess.run([shell, "-n", str(scripts / shell)], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_completes(scripts: Path) -> None:
    code = f"source {scripts / 'fish'}; complete -C 'starquant run method=quar'; complete -C 'starquant report smol'"
    done = subprocess.run(["fish", "-N", "-c", code], capture_output=True, text=True, timeout=30)
    assert [line.strip() for line in done.stdout.splitlines()] == [
        *(f"method={name}" for name in ("quarot", "quarot_folded", "quarot_rtn")),
        "smol_main",
    ]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_completes(scripts: Path) -> None:
    stubs = "compdef() { : }; _files() { : }; compadd() { print -rl -- ${@[2,-1]} }"
    code = f"{stubs}; source {scripts / 'zsh'}; words=(starquant tables t); CURRENT=3; _starquant"
    done = subprocess.run(["zsh", "-f", "-c", code], capture_output=True, text=True, timeout=30)
    assert {"table1_main", "figure1_activations"} <= {*done.stdout.split()}
    assert "method=rtn" not in done.stdout


def test_keys_are_what_a_run_takes() -> None:
    words = keys()
    assert {"model=tiny", "experiment=smol_main", "tasks.limit=", "method.alpha=", "method.sgat.keep="} <= {*words}
    assert not [word for word in words if word.startswith(("hydra", "model.protocol"))]
    assert plan_of(["experiment=none", "tasks.limit=3", "method.sgat.keep=if_better"]) is not None
    assert [*flattened({"a": {"b": 1, "c": {}}, "hydra": {"d": 1}, "e": [2]})] == ["a.b", "a.c", "e"]


def test_an_unknown_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bsh"]) == 2
    assert (
        capsys.readouterr().err
        == "error: starquant completion: shell: got 'bsh', allowed: bash, zsh, fish. Did you mean 'bash'?\n"
    )
