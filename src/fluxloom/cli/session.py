"""``fluxloom session``"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxloom.cli import drawing, interrupts, options
from fluxloom.cli.output import plain, print_facts, print_json, print_table
from fluxloom.cli.progress import Watch
from fluxloom.errors import BadInput

if TYPE_CHECKING:
    from fluxloom.api import Loom
    from fluxloom.edit.graph import Node
    from fluxloom.edit.session import Session
    from fluxloom.infer.finish import Finisher
    from fluxloom.infer.request import Reference, Result

app = typer.Typer(add_completion=False)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The session's folder.", show_default=False)]
Ref = Annotated[
    str | None, typer.Argument(metavar="[NODE]", help="A node's first digits, or a branch.", show_default="the current")
]
Inputs = Annotated[
    list[Path] | None,
    typer.Option("--input", help="A LoRA or a depth model that it was made with; repeatable.", show_default=False),
]
_FIELDS = ("negative", "quality", "steps", "guidance", "true_cfg", "solver")  # options that are fields of a request


@app.callback()
def session() -> None:
    """Keep every step of a piece of work: pictures as a tree in one folder, with undo, branches and replay."""


# -------------------------------------------------------------------------------------------------------- new pictures


@app.command()
def new(
    folder: Folder,
    seed: Annotated[int | None, typer.Option("--seed", "-s", help="What all fresh seeds follow from.")] = None,
    json: options.Json = False,
) -> None:
    """Begin a session in a new folder."""
    from fluxloom.edit.session import Session

    Session.create(folder, seed)
    _say({"session": str(folder)}, json, str(folder))


@app.command("import")
def import_(
    folder: Folder,
    picture: Annotated[Path, typer.Argument(help="JPEG, PNG, WebP, TIFF ...", show_default=False)],
    json: options.Json = False,
) -> None:
    """Take a picture in, byte for byte."""
    found = _open(folder)
    _show(found, found.import_picture(picture), json)


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="What to draw, in English or Chinese.", show_default=False)],
    model: options.Model = "nano",
    variant: options.Variant = None,
    base: options.Base = None,
    offline: options.Offline = False,
    negative: options.Negative = "",
    seed: options.Seed = None,
    size: options.Size = None,
    quality: options.Quality = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    true_cfg: options.TrueCfg = None,
    solver: options.Solver = None,
    lora: options.Loras = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    executor: options.Executor = "auto",
    linears: options.Linears = None,
    attention: options.Attention = "auto",
    vram: options.Vram = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Draw a picture from a prompt, as the beginning of another tree."""
    given = locals()
    found = _open(folder)
    with Watch(f"loading {model}", quiet=quiet) as watch:
        draw, fields = _ready(given, watch, "drawing")
        node = found.generate(draw, prompt, seed=seed, **fields)
    _show(found, node, json)


@app.command()
def edit(
    folder: Folder,
    instruction: Annotated[str, typer.Argument(help="What to change, in English or Chinese.", show_default=False)],
    at: Annotated[
        str | None, typer.Option("--at", metavar="NODE", help="Begin there; default: the current picture.")
    ] = None,
    model: options.Model = "nano",
    variant: options.Variant = None,
    base: options.Base = None,
    offline: options.Offline = False,
    negative: options.Negative = "",
    seed: options.Seed = None,
    n: options.Number = 1,
    size: options.Size = None,
    quality: options.Quality = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    true_cfg: options.TrueCfg = None,
    solver: options.Solver = None,
    reference: options.References = None,
    lock: options.Lock = "auto",
    mask: options.Within = None,
    box: options.Box = None,
    lora: options.Loras = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    executor: options.Executor = "auto",
    linears: options.Linears = None,
    attention: options.Attention = "auto",
    vram: options.Vram = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Change the current picture by instruction. Of several (-n) the first becomes the current one."""
    given = locals()
    found = _open(folder)
    start = found.node(at)  # found out before a model is loaded
    if n < 1:
        raise BadInput(f"got -n {n}, allowed 1 or more pictures, try 1")
    nodes, inside = [], drawing.sides("--box", box)
    with Watch(f"loading {model}", quiet=quiet) as watch:
        draw, fields = _ready(given, watch, "editing")
        fields |= {"lock": lock, "mask": mask, "box": inside, "references": _references(reference)}
        for k in range(n):
            fields["seed"] = None if seed is None else seed + k
            place = {"at": at} if k == 0 else {"at": start.id, "stay": True}
            nodes.append(found.edit(partial(_edit, draw), instruction, **place, **fields))
    if n == 1:
        _show(found, nodes[0], json)
    else:
        _say({"nodes": [_facts(found, node) for node in nodes]}, json, *(_line(found, node) for node in nodes))


def shortcut(given: Mapping[str, Any], folder: Path, image: Path, instruction: str) -> None:
    """``fluxloom edit IMAGE INSTRUCTION --session FOLDER``: the picture is found in the session, or taken in first; the
    session is made where there is none."""
    from fluxloom.edit.session import Session

    passed = {name: given[name] for name in signature(edit).parameters if name in given and name != "instruction"}
    others = [name for name in given if name not in (*passed, "image", "instruction", "session")]
    unused = [name for name in others if given[name] not in (None, False, "", [], (), 1) and name != "receipt"]
    unused += [] if given.get("receipt", True) else ["no-receipt"]
    if unused:
        flag = f"--{unused[0].replace('_', '-')}"
        raise BadInput(f"got {flag} with --session, which keeps every picture itself, allowed one, try session export")
    found = _open(folder) if (folder / "session.db").exists() else Session.create(folder)
    node = found.find(image) or found.import_picture(image)
    edit(folder, instruction, at=None if node.current else (*node.branches, node.id)[0], **passed)


# ------------------------------------------------------------------------------------------------------------- looking


@app.command()
def log(folder: Folder, json: options.Json = False) -> None:
    """Show the tree: every picture, the names of branches, and where the session stands."""
    found = _open(folder)
    nodes = found.log()
    facts = {"nodes": [node.to_dict() for node in nodes], "branches": found.branches, **vars(found.position)}
    _say(facts, json, *tree(nodes, found.position.branch))


@app.command()
def show(folder: Folder, node: Ref = None, json: options.Json = False) -> None:
    """Show all about a node: what was asked, its file, its receipt."""
    _say(_open(folder).show(node), json)


@app.command()
def compare(
    folder: Folder,
    a: Annotated[str, typer.Argument(help="A node or a branch.", show_default=False)],
    b: Annotated[str, typer.Argument(help="Another.", show_default=False)],
    json: options.Json = False,
) -> None:
    """Compare two nodes: where their ways part, and how far apart the pictures are."""
    _say(_open(folder).compare(a, b), json)


@app.command()
def drift(
    folder: Folder,
    node: Ref = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Draw the curves to a picture.")] = None,
    json: options.Json = False,
) -> None:
    """Measure how far the unchanged parts have drifted, turn by turn and since the beginning."""
    found = _open(folder)
    from fluxloom.edit.chain import drift_rows

    rows = drift_rows(found, node)
    facts: dict[str, Any] = {"turns": rows}
    if out is not None:
        facts["path"] = str(_curves(rows, out))
    if json:
        print_json(facts)
        return
    nodes, names = found.log(), ("psnr", "ssim", "delta_e", "sharpness", "shift")
    table = [
        [str(turn), _short(row["id"], nodes), plain(row["instruction"]), f"{100 * row['changed']:.1f} %"]
        + [f"{_number(row['step'][name])} {_number(row['total'][name])}" for name in names]
        for turn, row in enumerate(rows, 1)
    ]
    print_table(["turn", "node", "instruction", "changed", *(f"{name} (turn, all)" for name in names)], table)
    if out is not None:
        print(out)


# -------------------------------------------------------------------------------------------------------------- moving


@app.command()
def checkout(
    folder: Folder,
    node: Annotated[str, typer.Argument(metavar="NODE|BRANCH", help="Where to stand.", show_default=False)],
    json: options.Json = False,
) -> None:
    """Stand at a node, or at a branch, which then grows with the next edit."""
    found = _open(folder)
    _show(found, found.checkout(node), json)


@app.command()
def undo(folder: Folder, json: options.Json = False) -> None:
    """Go back to where the session stood before; nothing is removed."""
    found = _open(folder)
    _show(found, found.undo(), json)


@app.command()
def redo(folder: Folder, json: options.Json = False) -> None:
    """Go forward again."""
    found = _open(folder)
    _show(found, found.redo(), json)


@app.command()
def branch(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="A new name.", show_default=False)],
    node: Ref = None,
    json: options.Json = False,
) -> None:
    """Begin a branch and stand on it."""
    found = _open(folder)
    _show(found, found.branch(name, node), json)


# ---------------------------------------------------------------------------------------------------------- the folder


@app.command()
def export(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="A file, or a folder for the whole way to it.", show_default=False)],
    node: Annotated[str | None, typer.Option("--node", help="Which; default: the current one.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
    json: options.Json = False,
) -> None:
    """Write a picture to a file, or all that led to it to a folder."""
    paths = [str(path) for path in _open(folder).export(out, node, force)]
    _say({"paths": paths}, json, *paths)


@app.command()
def gc(folder: Folder, json: options.Json = False) -> None:
    """Remove what killed processes have left; never a step."""
    facts = _open(folder).gc()
    _say(facts, json, f"{facts['removed']} files, {facts['bytes']:,} bytes removed")


@app.command()
def verify(folder: Folder, json: options.Json = False) -> None:
    """Check every node against its file, its receipt and its parent; exit code 1 if one is broken."""
    from fluxloom.cli.verify import report
    from fluxloom.edit.chain import verify_session

    report(verify_session(_open(folder)), json)


@app.command()
def replay(
    folder: Folder,
    node: Annotated[str | None, typer.Argument(metavar="[NODE]", show_default="all", help="What leads to it.")] = None,
    inputs: Inputs = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="REF", help="Model reference; default: as in the receipts.")
    ] = None,
    variant: options.Variant = None,
    base: options.Base = None,
    offline: options.Offline = False,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Draw all pictures again from their receipts, and compare: exit code 1 if one comes out different."""
    found = _open(folder)
    from fluxloom.edit.chain import replay_session
    from fluxloom.infer.receipt import read_receipt

    looms: dict[str, Loom] = {}
    rows = []
    with Watch("drawing again", quiet=quiet) as watch:
        more = {"variant": variant, "base": base, "offline": offline, "progress": watch.part}

        def again(path: Path, given: Sequence[Any]) -> Any:
            name = model or str(read_receipt(path).data["model"].get("name"))
            if name not in looms:
                looms[name] = drawing.load(name, device, None, dtype, **more)
            return looms[name].replay(path, given, watch.step)

        nodes = found.log()
        for row in replay_session(found, again, node, inputs or ()):
            rows.append(row)
            if not json:
                far = "" if row.psnr is None else f"  largest difference {row.max_difference}, {row.psnr:.1f} dB"
                why = "" if not row.causes else f"  ({plain('; '.join(row.causes))})"
                print(f"{_short(row.node.id, nodes)}  {row.verdict}{far}{why}", flush=True)
    same = all(row.verdict in ("given", "bit-exact") for row in rows)
    if json:
        print_json({"nodes": [row.to_dict() for row in rows], "bit_exact": same})
    if not same:
        raise typer.Exit(1)


# -------------------------------------------------------------------------------------------------------------- inside


def tree(nodes: Sequence[Node], branch: str | None = None) -> Iterator[str]:
    """A line for each node under its parent. The latest child goes on in its parent's column, others beside it."""
    children: dict[str | None, list[Node]] = {}
    for node in nodes:
        children.setdefault(node.parent, []).append(node)
    todo = [("", "", root) for root in children.get(None, [])[::-1]]
    while todo:
        rail, lead, node = todo.pop()
        names = [f"{name}*" if node.current and name == branch else name for name in node.branches]
        asked = plain(node.instruction or node.file or "a picture")
        words = [_short(node.id, nodes), asked, *([f"({', '.join(names)})"] if names else [])]
        yield f"{lead}{'●' if node.current else '○'} {'  '.join(words)}{'  <- here' if node.current else ''}"
        for k, child in enumerate(children.get(node.id, [])[::-1]):
            todo.append((rail, rail, child) if k == 0 else (f"{rail}│ ", f"{rail}├─", child))


def _open(folder: Path) -> Session:
    from fluxloom.edit.session import Session

    return Session.open(folder)


def _ready(given: Mapping[str, Any], watch: Watch, verb: str) -> tuple[Callable[..., Result], dict[str, Any]]:
    """What draws a prompt, watched, and the fields of the request that the options ask for."""
    fields = {**drawing.size_fields(given["size"]), **{name: given[name] for name in _FIELDS}}
    loom = drawing.loaded(given, watch)
    from fluxloom.infer.request import Request

    watch.what = verb
    interrupts.unwind()

    def draw(prompt: str, finishers: Sequence[Finisher] = (), **asked: Any) -> Result:
        return loom.run(Request(prompt=prompt, **asked), watch.step, finishers)[0]

    return draw, {**fields, "loras": drawing.loras(given["lora"])}


def _edit(draw: Callable[..., Result], picture: Any, instruction: str, **fields: Any) -> Result:
    """As ``Loom.edit``, watched."""
    from fluxloom.api import within
    from fluxloom.infer.request import Reference

    asked, finishers = within(picture, fields.pop("lock"), fields.pop("mask"), fields.pop("box"))
    references = (Reference(picture), *fields.pop("references"))
    return draw(instruction, finishers, references=references, **asked, **fields)


def _references(paths: Sequence[Path] | None) -> tuple[Reference, ...]:
    from fluxloom.infer.request import Reference

    return tuple(Reference(path) for path in paths or ())


def _curves(rows: Sequence[Mapping[str, Any]], out: Path) -> Path:
    from fluxloom.edit.curves import curves
    from fluxloom.infer.files import encode, format_of, write

    return write(out, encode(curves(rows), format_of(out)))


def _show(found: Session, node: Node | None, json: bool) -> None:
    if node is None:
        _say({"id": None}, json, "before the first picture")
        return
    receipt = found.receipt(node)
    for note in () if receipt is None or json else receipt.data["warnings"]:
        typer.echo(plain(f"fluxloom: note: {note}"), err=True)
    _say(_facts(found, node), json, _line(found, node))


def _facts(found: Session, node: Node) -> dict[str, Any]:
    return {**node.to_dict(), "path": str(found.store.objects / node.picture[:2] / node.picture)}


def _line(found: Session, node: Node) -> str:
    """A node as one line of the log."""
    names = f"  ({', '.join(node.branches)})" if node.branches else ""
    changed = f"  {100 * node.meters['changed']:.1f} % changed" if node.meters else ""
    return f"{_short(node.id, found.log())}  {plain(node.instruction or node.file or 'a picture')}{names}{changed}"


def _short(name: str, nodes: Sequence[Node]) -> str:
    from fluxloom.edit.graph import short

    return short(name, list(nodes))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _say(facts: Mapping[str, Any], json: bool, *lines: str) -> None:
    """One JSON object, or lines for people: the facts themselves where there are no better ones."""
    if json:
        print_json(facts)
    elif lines:
        print("\n".join(lines))
    else:
        print_facts(facts)
