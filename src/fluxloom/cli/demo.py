"""``fluxloom demo``"""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxloom.cli import drawing, options
from fluxloom.cli.output import Destination, slug
from fluxloom.cli.progress import Watch

if TYPE_CHECKING:
    from fluxloom.api import Loom
    from fluxloom.infer.request import Result
    from fluxloom.recipes.demo import Line

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")] = Path("demo"),
    page: Annotated[
        Path | None,
        typer.Option("--sheet", help="Contact sheet: .png, .jpg or .webp.", show_default="sheet.webp in --out"),
    ] = None,
    size: options.Size = None,
    steps: options.Steps = None,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
) -> None:
    """Draw prompts in two languages, edit pictures in chains, and lay them out on a contact sheet."""
    page = page or out / "sheet.webp"
    began = time.perf_counter()
    with Watch("loading nano", quiet=quiet) as watch:
        loom = drawing.load("nano", threads=threads)
        from fluxloom.infer.files import encode, format_of, write
        from fluxloom.recipes.demo import CHAINS, PROMPTS, sheet

        form = format_of(page)
        Destination(out).probe()
        Destination(page.parent).probe()
        artist = Artist(loom, watch, out, {"steps": steps, **drawing.size_fields(size)})
        drawn = [(artist.draw(line, f"{number:02d}").image, line) for number, line in enumerate(PROMPTS, 1)]
        chains = [
            [(result.image, line) for result, line in zip(artist.chain(lines, number), lines, strict=True)]
            for number, lines in enumerate(CHAINS, 1)
        ]
        for number, chain in enumerate(chains, 1):
            write(out / f"chain-{number}.webp", encode(sheet([], [chain]), "WEBP", quality=90))
        write(page, encode(sheet(drawn, chains), form, quality=None if form == "PNG" else 60))
    edits, seconds = sum(len(chain) - 1 for chain in chains), time.perf_counter() - began
    print(page)
    print(f"drew {len(drawn) + len(chains)} pictures and edited {edits} in {seconds:.0f} s; all are in {out}")


class Artist:
    """Draws and edits with seeds 1, 2, 3, ... and saves under numbered names."""

    def __init__(self, loom: Loom, watch: Watch, out: Path, fields: dict[str, Any]) -> None:
        self.loom, self.watch, self.out, self.fields = loom, watch, out, fields
        self.seeds = count(1)

    def draw(self, line: Line, number: str, source: Result | None = None) -> Result:
        """One picture of a prompt, or of an instruction for the source."""
        from fluxloom.infer.request import Reference, Request

        references = () if source is None else (Reference(source),)
        self.watch.what = line.text
        request = Request(prompt=line.text, references=references, seed=next(self.seeds), **self.fields)
        (result,) = self.loom.run(request, self.watch.step)
        print(result.save(self.out / f"{number}-{slug(line.text)}.png"))
        return result

    def chain(self, lines: tuple[Line, ...], number: int) -> list[Result]:
        """A picture, and each instruction applied to the picture before."""
        results: list[Result] = []
        for step, line in enumerate(lines):
            results.append(self.draw(line, f"chain-{number}-{step}", results[-1] if results else None))
        return results
