"""``fluxloom verify``"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fluxloom.cli import options
from fluxloom.cli.output import plain, print_json

if TYPE_CHECKING:
    from fluxloom.edit.chain import Finding

app = typer.Typer(add_completion=False)


@app.command()
def verify(
    subject: Annotated[
        Path, typer.Argument(metavar="PICTURE|SESSION", help="A picture, or a session's folder.", show_default=False)
    ],
    session: Annotated[
        Path | None, typer.Option("--session", help="Where a picture may come from.", show_default=False)
    ] = None,
    json: options.Json = False,
) -> None:
    """Check a picture, and all that it was made from as far as that lies beside it or in a session, by hashes alone;
    exit code 1 if anything is broken."""
    from fluxloom.edit.chain import verify_picture, verify_session
    from fluxloom.edit.session import Session

    if subject.is_dir():
        report(verify_session(Session.open(subject)), json)
    else:
        report(verify_picture(subject, None if session is None else Session.open(session)), json)


def report(findings: Sequence[Finding], json: bool) -> None:
    """Show what was found and end with exit code 1 if anything is broken."""
    broken = sum(found.state == "broken" for found in findings)
    if json:
        print_json({"sound": not broken, "findings": [found.to_dict() for found in findings]})
    else:
        for found in findings:
            if found.detail:
                print(f"{found.state:6}  {plain(found.subject)}  {plain(found.detail)}")
        sound = sum(found.state == "sound" for found in findings)
        print(f"{sound} sound, {broken} broken" if broken else f"all {sound} sound")
    if broken:
        raise typer.Exit(1)
