"""The group of commands. A command's module is imported when the command (or the list of all) is asked for; none of
them imports torch, numpy or PIL before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fluxloom.cli import settings


class Commands(Mapping[str, Any]):
    """``fluxloom.cli.<name>`` has the command <name>."""

    names = (
        "generate", "edit", "batch", "session", "replay", "verify", "info", "convert", "models", "plan", "templates",
        "lora", "world", "train", "evals", "bench", "demo",
    )  # fmt: skip

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        command = typer.main.get_command(import_module(f"fluxloom.cli.{name}").app)
        command.name = name
        return settings.bind(command) if name in settings.TABLES else command

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class LazyGroup(TyperGroup):
    """A group that loads what is called."""

    def __init__(self, **facts: Any) -> None:
        super().__init__(**facts)
        self.commands = Commands()  # type: ignore[assignment]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in settings.TABLES:
            ctx.default_map = {name: settings.table(name, settings.keys(command))}
        return name, command, rest


def _version(wanted: bool) -> None:
    if wanted:
        from fluxloom import __version__

        print(f"fluxloom {__version__}")
        raise typer.Exit


app = typer.Typer(cls=LazyGroup, add_completion=False, pretty_exceptions_enable=False)


@app.callback(epilog="Options of generate and edit may also be set as FLUXLOOM_OPTION or in fluxloom.toml.")
def fluxloom(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the line.")] = False,
) -> None:
    """Draw pictures from prompts and edit them by instruction: an open implementation of the FLUX.1 image system."""
