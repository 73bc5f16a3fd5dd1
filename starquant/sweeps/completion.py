"""Words for a shell to complete: commands, experiments, every group's options, every key.

eval "$(starquant completion bash)"          in ~/.bashrc; zsh likewise, in ~/.zshrc
starquant completion fish > ~/.config/fish/completions/starquant.fish
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from starquant.commands import COMMANDS
from starquant.errors import CommandParser, one_line_errors, one_of
from starquant.reports.definitions import ACTIVATIONS, FIGURES, SEED_TABLES, TABLES
from starquant.sweeps.catalogue.reading import composing, options
from starquant.sweeps.overrides import CONF

#: Not keys that a person types: a table of every task's protocol, what a run fills in.
LEFT_OUT = ("hydra", "model.protocol", "experiment")
#: Commands that take KEY=VALUE, and those that take models as plain words.
OF_RUNS, OF_MODELS = "run export status", "export generate"
BASH = """\
_starquant() {{
    local current=${{COMP_LINE:0:COMP_POINT}} words=""
    local before=${{current% *}}
    current=${{current##* }}
    read -ra before <<< "$before"
    if (( ${{#before[@]}} < 2 )); then words="{commands} {keys}"; fi
    case "${{before[1]:-}}" in
        run | *=*) words="{keys}" ;;
        export) words="{models} {keys}" ;;
        status) words="{experiments} {keys}" ;;
        generate) words="{models}" ;;
        tables) words="{tables}" ;;
        report) words="{pages}" ;;
        completion) words="bash zsh fish" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    if [[ ${{COMPREPLY[0]:-}} == *= ]]; then compopt -o nospace 2> /dev/null; fi
    if [[ $current == *=* && $COMP_WORDBREAKS == *=* ]]; then COMPREPLY=("${{COMPREPLY[@]#"${{current%=*}}="}}"); fi
}}
complete -o default -F _starquant starquant
"""
ZSH = """\
#compdef starquant
_starquant() {{
    local -a found
    if (( CURRENT == 2 )); then found=({commands} {keys}); fi
    case "${{words[2]}}" in
        run | *=*) (( CURRENT > 2 )) && found=({keys}) ;;
        export) (( CURRENT > 2 )) && found=({models} {keys}) ;;
        status) (( CURRENT > 2 )) && found=({experiments} {keys}) ;;
        generate) (( CURRENT > 2 )) && found=({models}) ;;
        tables) (( CURRENT > 2 )) && found=({tables}) ;;
        report) (( CURRENT > 2 )) && found=({pages}) ;;
        completion) (( CURRENT > 2 )) && found=(bash zsh fish) ;;
    esac
    compadd -S '' -- ${{(M)found:#*=}}
    compadd -- ${{found:#*=}}
    _files
}}
compdef _starquant starquant
"""
FISH = """\
complete -c starquant -n __fish_use_subcommand -a "{commands}"
complete -c starquant -n "__fish_seen_subcommand_from {of_runs}; or __fish_use_subcommand" -a "{keys}"
complete -c starquant -n "__fish_seen_subcommand_from {of_models}" -a "{models}"
complete -c starquant -n "__fish_seen_subcommand_from status" -a "{experiments}"
complete -c starquant -n "__fish_seen_subcommand_from tables" -a "{tables}"
complete -c starquant -n "__fish_seen_subcommand_from report" -a "{pages}"
complete -c starquant -n "__fish_seen_subcommand_from completion" -a "bash zsh fish"
"""
SHELLS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def flattened(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a configuration that hold a value, not further keys."""
    for name, value in config.items():
        dotted = f"{prefix}{name}"
        if dotted not in LEFT_OUT:
            if isinstance(value, Mapping) and value:
                yield from flattened(value, f"{dotted}.")
            else:
                yield dotted


def keys() -> list[str]:
    """Return what a run's words may be: GROUP=OPTION of every option, KEY= of every key of every method."""
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir())
    chosen = [f"{group}={option}" for group in groups for option in options(group)]
    with composing() as compose:
        dotted = set(flattened(compose("config", ())))
        for name in options("method"):
            dotted |= set(flattened(compose(f"method/{name}", ())))
    return [*chosen, *(f"{key}=" for key in sorted(dotted))]


def script(shell: str, commands: Sequence[str]) -> str:
    """Return what a shell evaluates.

    Args:
        shell: of `SHELLS`.
        commands: of `starquant`.
    """
    words = {
        "commands": commands,
        "keys": keys(),
        "models": options("model"),
        "experiments": [name for name in options("experiment") if name != "none"],
        "pages": [*TABLES, *SEED_TABLES, *FIGURES],
        "tables": [*TABLES, *SEED_TABLES, *FIGURES, ACTIVATIONS],
    }
    of = {"of_runs": OF_RUNS, "of_models": OF_MODELS}
    return SHELLS[shell].format(**{name: " ".join(listed) for name, listed in words.items()}, **of)


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print a shell's script; returns 2 after bad input."""
    parser = CommandParser(
        prog="starquant completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", type=one_of(SHELLS), help=", ".join(SHELLS))
    chosen = parser.parse_args(arguments)
    print(script(chosen.shell, [*COMMANDS]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
