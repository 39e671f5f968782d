"""Click's usage errors in the house form: got, allowed, try."""

from __future__ import annotations

import re
from typing import Any

from fluxloom.cli import settings

_QUOTED = re.compile(r"'(.*?)'")
_OPTION = re.compile(r"--?[\w-]+")


def explain(error: Any) -> str:
    """One line for a usage error of Click: an unknown or unfinished option, a missing, superfluous or bad value."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "fluxloom"
    help_line = f"`{path} --help`"
    commands = getattr(context.command, "commands", None) if context else None
    param = getattr(error, "param", None)
    kind = type(error).__name__
    if kind == "NoSuchOption":
        near = settings.nearest(error.option_name, error.possibilities or ())
        return f"got unknown option {error.option_name}, allowed what {help_line} lists, try {near or 'that'}"
    if kind == "MissingParameter" and param is not None:
        return f"got no {param.name.upper()}, allowed {_words(param.help)}, try {help_line}"
    if param is not None:
        return f"got {_where(param, context)}{_value(error)}, allowed {_allowed(error.message)}, try {help_line}"
    if commands and kind == "UsageError":
        found = _QUOTED.search(error.message)
        got = f"unknown command {found[0]}" if found else "no command"
        near = settings.nearest(found[1], commands) if found else next(iter(commands))
        return f"got {got}, allowed {', '.join(commands)}, try `{path} {near or '--help'}`"
    return f"got {error.format_message().rstrip('.')}, allowed what {help_line} lists, try that"


def _words(text: str | None) -> str:
    return (text or "a value").rstrip(".").lower()


def _where(param: Any, context: Any) -> str:
    """The name under which the value was given: a flag, an environment variable or a key of the settings file."""
    source = context.get_parameter_source(param.name) if context else None
    if source is not None and source.name == "ENVIRONMENT":
        return str(param.envvar)
    if source is not None and source.name == "DEFAULT_MAP":
        return f"{param.name} in {settings.FILE}"
    flags = [flag for flag in param.opts if _OPTION.fullmatch(flag)]
    return max(flags, key=len) if flags else str(param.name).upper()


def _value(error: Any) -> str:
    """The value itself, which only the cause (a validation error) knows."""
    details: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()
    return f" {str(details[0]['input'])[:40]!r}" if details else ""


def _allowed(message: str) -> str:
    """``Input should be a valid integer, unable to parse ...`` -> ``a valid integer``."""
    return message.removeprefix("Input should be ").split(",")[0].rstrip(".")
