"""``fluxloom.toml``: defaults for ``generate`` and ``edit``, from the current folder or the nearest parent.

    [generate]
    steps = 20
    size = "256x192"

Precedence: flag, environment (FLUXLOOM_STEPS), this file, the model's row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fluxloom.errors import BadInput

FILE = "fluxloom.toml"
TABLES = ("generate", "edit")


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The word that was probably meant."""
    return next(iter(get_close_matches(word, list(words), n=1, cutoff=0.5)), None)


def keys(command: Any) -> dict[str, bool]:
    """The names under which the options of a Click command can be set, and whether they take several values."""
    return {param.name: param.multiple for param in command.params if param.param_type_name == "option"}


def bind(command: Any) -> Any:
    """Let every option of a Click command be set in the environment, too: --true-cfg as FLUXLOOM_TRUE_CFG."""
    for param in command.params:
        if param.param_type_name == "option":
            param.envvar, param.show_envvar = f"FLUXLOOM_{param.name.upper()}", False
    return command


def table(command: str, allowed: Mapping[str, bool]) -> dict[str, Any]:
    """The settings of one command, checked against the names of its options."""
    path = _find(Path.cwd())
    if path is None:
        return {}
    tables = _read(path)
    _check(path, "table", tables, TABLES)
    for name, content in tables.items():
        if not isinstance(content, dict):
            raise BadInput(f"got {name} = {content!r} in {path}, allowed a table, try [{name}]")
    chosen = {key.replace("-", "_"): value for key, value in tables.get(command, {}).items()}
    _check(path, f"key in [{command}]", chosen, allowed)
    # As if typed: "256" and 256 are the same size, and a wrong type is found as in a flag.
    return {key: _words(value) if allowed[key] else str(value) for key, value in chosen.items()}


def _words(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def _find(folder: Path) -> Path | None:
    return next((at / FILE for at in (folder, *folder.parents) if (at / FILE).is_file()), None)


def _read(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"got {path}, which is no TOML ({error}), allowed tables [generate] and [edit]") from error


def _check(path: Path, what: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    names = sorted(allowed)
    for name in given:
        if name not in names:
            hint = nearest(name, names) or names[0]
            raise BadInput(f"got unknown {what} {name!r} in {path}, allowed {', '.join(names)}, try {hint!r}")
