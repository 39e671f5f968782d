"""What a reference means before anything of it is fetched: its files, its parts, what it is, and what would run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fluxloom.core.specs import ModelSpec
from fluxloom.errors import FluxloomError, WeightsError
from fluxloom.weights.blobs import size_text
from fluxloom.weights.checkpoint import Checkpoint, open_checkpoint
from fluxloom.weights.describe import components, member, runs
from fluxloom.weights.download import Hub, Snapshot, Unreachable, no_such_file
from fluxloom.weights.hub import Located, resolve
from fluxloom.weights.identify import identify
from fluxloom.weights.layout import ADAPTER, TRANSFORMER
from fluxloom.weights.references import Repository, parse
from fluxloom.weights.shelves import Part

_MAIN = "main"


def survey(reference: str, *, offline: bool = False, hub: Hub | None = None) -> dict[str, Any]:
    """Facts of a member or of a repository; of what is still on a hub only listings and a header are asked for.

    What keeps it from being loaded as it stands is the fact ``lacks``. Raises UnknownModel, BadInput and Failure for
    what is not there, or cannot be asked for.
    """
    hub = hub or Hub()
    hub = replace(hub, offline=hub.offline or offline)
    target = parse(reference, hub.endpoint)
    facts: dict[str, Any] = {"reference": reference}
    if isinstance(target, ModelSpec):
        facts |= member(target.name)
        if target.source is None:
            return facts
    if isinstance(target, Repository):
        facts |= _listed(reference, target, hub)
    located, lacks = None, None
    for companions in (True, False):  # without them where they are not to be had
        try:
            located = resolve(reference, hub=hub, fetch=False, companions=companions)
            break
        except FluxloomError as error:
            lacks = lacks or str(error)
    return {**facts, **(_parts(located) if located else {}), "lacks": lacks}


def _listed(reference: str, target: Repository, hub: Hub) -> dict[str, Any]:
    """The files of a repository."""
    snapshot = _snapshot(target, hub)
    if snapshot is None:
        resolve(reference, hub=hub, fetch=False)  # which says what is not in the cache
        raise WeightsError(f"got {reference}, of which nothing is in the cache, try without --offline")
    if target.file and target.file not in snapshot.files:
        raise no_such_file(target.repo, target.file, tuple(snapshot.files))
    return {
        "repository": target.repo,
        "commit": snapshot.commit,
        "listing": "what is in the cache" if snapshot.cached else None,
        "files": {name: "?" if one.size < 0 else size_text(one.size) for name, one in sorted(snapshot.files.items())},
    }


def _snapshot(target: Repository, hub: Hub) -> Snapshot | None:
    cached = hub.cached(target.repo, target.revision or _MAIN)
    if hub.offline:
        return cached
    try:
        return hub.listed(target.repo, target.revision or _MAIN)
    except Unreachable:
        if cached is None:
            raise
        return cached


def _parts(located: Located) -> dict[str, Any]:
    main = located.parts.get(ADAPTER) or located.parts.get(TRANSFORMER) or next(iter(located.parts.values()))
    checkpoint = located.header or (None if main.lacks else open_checkpoint(main.path))
    lacking = {part.path: part.lacks for part in located.parts.values()}  # an all-in-one file is several parts
    return {
        "components": [] if checkpoint is None else components(checkpoint, main.sha256),
        "runs": _runs(located, main, checkpoint),
        "parts": [_part(part) for part in located.parts.values()],
        "to fetch": size_text(sum(lacking.values())) if any(lacking.values()) else None,
        "bytes to fetch": sum(lacking.values()),
        "notes": list(located.notes),
    }


def _runs(located: Located, main: Part, checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        names = " or ".join(located.candidates)
        return f"as {names}, once it is fetched" if names else "what it is shows once it is fetched"
    return runs(identify(checkpoint, main.sha256), located.parts)


def _part(part: Part) -> Mapping[str, Any]:
    return {
        "part": part.kind,
        "from": part.origin,
        "to fetch": size_text(part.lacks) if part.lacks else None,
        "bytes to fetch": part.lacks,
    }
