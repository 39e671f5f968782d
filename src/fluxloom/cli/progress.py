"""Progress on a terminal, with the growing picture in half blocks when asked for. Elsewhere: silence."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from rich.text import Text

    from fluxloom.infer.preview import Preview


class Watch:
    """A live display on standard error while it is entered; does nothing where that is no terminal, or if quiet."""

    def __init__(self, what: str, *, quiet: bool = False, preview: bool = False) -> None:
        self.what, self.preview = what, preview
        self.live: Any = None
        if not quiet and sys.stderr.isatty():
            self._set_up()

    def _set_up(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        what = TextColumn("{task.description}", markup=False)
        self.bar = Progress(SpinnerColumn(), what, BarColumn(), MofNCompleteColumn(), auto_refresh=False)
        self.task = self.bar.add_task(self.what, total=None)
        self.live = Live(
            self.bar,
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=8,
            redirect_stdout=sys.stdout.isatty(),  # what is piped stays in its pipe
        )

    def __enter__(self) -> Watch:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def step(self, event: Preview) -> None:
        """Show a step of a picture."""
        if self.live is None:
            return
        what = self.what if event.pictures == 1 else f"{self.what} {event.picture + 1}/{event.pictures}"
        self.bar.update(self.task, description=what, completed=event.step.index + 1, total=event.step.total)
        if self.preview:
            from rich.console import Group

            size = self.live.console.size
            self.live.update(Group(half_blocks(event.quick, size.width, size.height - 3), self.bar))

    def part(self, name: str, done: int, total: int) -> None:
        """Show how much of one part of a longer work is done: bytes of a file, tensors of a component."""
        self.what = f"loading {name}"
        self.count(done, total)

    def count(self, done: int, total: int) -> None:
        """Show how much of a longer work is done."""
        if self.live is not None:
            self.bar.update(self.task, description=self.what, completed=done, total=total)


def half_blocks(image: Image.Image, columns: int, lines: int) -> Text:
    """A picture as text: each character is two pixels, one above the other, about as wide as they are high."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    scale = min(columns / image.width, 2 * lines / image.height, 1.0)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale / 2))
    small = image.convert("RGB").resize((width, 2 * height))
    text = Text(no_wrap=True)
    for y in range(0, 2 * height, 2):
        for x in range(width):
            above, below = (Color.from_rgb(*small.getpixel((x, row))) for row in (y, y + 1))  # type: ignore[misc]
            text.append("▀", Style(color=above, bgcolor=below))
        text.append("\n")
    return text
