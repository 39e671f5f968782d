"""From a model reference to files on the disk.

    nano                                  comes with the package
    flux1-kontext-dev                     a member: its publisher's repository
    owner/name[@revision][:file]          a repository of a hub, also as the address of its page or of a file's page
    folder                                as diffusers saves it, or a transformer's file with its companions
    file                                  .safetensors, .sft, .gguf: a transformer, all in one, or an adapter

What a file lacks is looked for beside it, in the folders that FLUXLOOM_MODELS names (several, separated as in PATH),
and in the cache. Nothing is downloaded twice: of a repository that holds the transformer as one file and as shards of
diffusers, one of them is. An adapter that is a member (a control LoRA, Redux) comes with its base, which is looked for
in the same places and then fetched, or is the one that ``base`` names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from fluxloom.core.specs import MODELS, ModelSpec
from fluxloom.errors import BadInput, Failure, WeightsError
from fluxloom.weights import layout, shelves
from fluxloom.weights.blobs import COMMIT, size_text
from fluxloom.weights.download import Hub, Progress, Unreachable, no_such_file
from fluxloom.weights.layout import ADAPTER, IMAGES, KINDS, MODEL, SUFFIXES, TRANSFORMER, Pick
from fluxloom.weights.references import Repository, checked, parse, refuse_pickle
from fluxloom.weights.shelves import FOLDERS, Folder, Part, Remote, Shelf

if TYPE_CHECKING:
    from fluxloom.weights.checkpoint import Checkpoint
    from fluxloom.weights.identify import Component

COMPACT = "compact"  # a folder with card.json, as nano's
_CARD = "card.json"
_EMBEDDED = Path(__file__).parents[1] / "assets"
_MAIN = "main"
PARTS = MappingProxyType({"lora": ADAPTER, "redux": ADAPTER, "siglip": IMAGES})  # component: the part that it is


@dataclass(frozen=True)
class Located:
    """What a reference means.

    parts       components by kind (``layout.KINDS``; ``compact``: one folder that holds everything, as nano's); of a
                file that holds several components each names that file
    candidates  members that it may be, as far as the reference and the keys tell; empty: not known yet
    notes       what a user may want to know: a hub that did not answer
    header      of a file that was only looked at: its tensors by name, unread
    """

    reference: str
    parts: Mapping[str, Part]
    candidates: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    header: Checkpoint | None = None


# ------------------------------------------------------------------------------------------ resolving


def resolve(
    reference: str | os.PathLike[str],
    *,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
    variant: str | None = None,
    progress: Progress | None = None,
    companions: bool = True,
    layouts: Sequence[str] = (layout.OFFICIAL, layout.DIFFUSERS),
    hub: Hub | None = None,
    base: str | os.PathLike[str] | None = None,
    fetch: bool = True,
) -> Located:
    """Find, and fetch where need be, the files that a reference means.

    revision    of a repository: a branch, tag or commit
    offline     use what is there; nothing is asked of a hub
    token       for repositories that want one; HF_TOKEN, or what ``hf auth login`` saved, unless given
    variant     which member a file is, where its keys cannot tell (dev, Krea and Kontext have the same)
    progress    told (file, bytes done, bytes in all); every file once before the first byte of any of its repository
    companions  False: only what the reference itself names, and no error about what it lacks
    layouts     which layouts of a transformer the caller can use, the preferred one first; what is already in the
                cache is preferred to either
    base        of an adapter: a reference to the whole model that it is added to, instead of its publisher's
    fetch       False: only find them; ``Part.lacks`` says how much would be fetched

    Raises UnknownModel, BadInput, WeightsError (a wrong checksum), Failure (no network, no access, no room).
    """
    if variant is not None and variant not in MODELS:
        hint = next(iter(get_close_matches(variant, MODELS, n=1, cutoff=0.4)), "flux1-dev")
        raise BadInput(f"got variant {variant!r}, allowed {', '.join(MODELS)}, try {hint}")
    hub = hub or Hub()
    hub = replace(hub, offline=hub.offline or offline, token=token or hub.token)
    target = parse(reference, hub.endpoint)
    if revision is not None:
        if not isinstance(target, ModelSpec | Repository) or getattr(target, "embedded", False):
            raise BadInput(f"got revision {revision!r} for {reference}, allowed for repositories only, try without it")
        checked("owner/name", revision, None)
    search = _Search(os.fspath(reference), hub, tuple(layouts), companions, progress, variant, base, fetch)
    return search.find(target, revision)


@dataclass
class _Search:
    """One call of :func:`resolve`."""

    reference: str
    hub: Hub
    layouts: tuple[str, ...]
    companions: bool
    progress: Progress | None
    variant: str | None
    base: str | os.PathLike[str] | None
    fetch: bool
    under: ModelSpec | None = None  # the adapter that a base is looked for
    notes: list[str] = field(default_factory=list)

    def find(self, target: ModelSpec | Repository | Path, revision: str | None = None) -> Located:
        if isinstance(target, ModelSpec):
            return self.member(target, revision)
        if isinstance(target, Path):
            return self.folder(target) if target.is_dir() else self.file(target)
        return self.repository(replace(target, revision=revision or target.revision))

    # -------------------------------------------------------------------------- the four kinds of reference

    def member(self, spec: ModelSpec, revision: str | None = None, *, collected: bool = True) -> Located:
        """A member by its name: folders of the user first, then its publisher's repository."""
        if spec.base is None:
            self._refuse_base()
        elif self.under is not None:
            raise self.no_base("an adapter itself")
        if spec.embedded:
            return self._located({COMPACT: _compact(_EMBEDDED / spec.name)}, (spec.name,))
        return self._located(self._published(spec, revision, collected), (spec.name,))

    def _published(
        self, spec: ModelSpec, revision: str | None, collected: bool, beside: Sequence[Shelf] = ()
    ) -> dict[str, Part]:
        """A member's parts and, of an adapter, those of its base."""
        if spec.source is None:
            raise BadInput(f"got {spec.name}: {spec.title}; allowed weights of your own, try their folder or file")
        kinds = layout.own_kinds(spec) if self.companions else layout.own_kinds(spec)[:1]
        # Files of a folder have no revision, and a repository that was named is meant.
        own = shelves.collections() if collected and revision is None else []
        places = chain(beside, own, self._hub(spec.source.repo, revision), self._known())
        parts = self._take(kinds, places, spec, None if revision else spec.source.sha256)
        return {**self._under(spec), **parts} if spec.base and self.companions else parts

    def _under(self, spec: ModelSpec, beside: Sequence[Shelf] = ()) -> dict[str, Part]:
        """The parts of the model that an adapter is added to."""
        assert spec.base is not None, "an adapter"
        if self.base is None:
            return self._published(MODELS[spec.base], None, True, beside)
        search = replace(self, reference=os.fspath(self.base), base=None, variant=None, under=spec)
        found = search.find(parse(self.base, self.hub.endpoint))
        if TRANSFORMER not in found.parts:
            raise search.no_base("no transformer of FLUX.1")
        return dict(found.parts)

    def no_base(self, what: str) -> BadInput:
        """Of a search for a base, which found something else."""
        assert self.under is not None
        return BadInput(
            f"got base {self.reference}, which is {what}, allowed a whole model to add {self.under.name} to, "
            f"try {self.under.base}"
        )

    def _refuse_base(self) -> None:
        if self.base is not None:
            adapters = ", ".join(spec.name for spec in MODELS.values() if spec.base)
            raise BadInput(
                f"got base {os.fspath(self.base)} for {self.reference}, which is no adapter, allowed for {adapters}, "
                "try without it"
            )

    def repository(self, target: Repository) -> Located:
        spec = next((s for s in MODELS.values() if s.source and s.source.repo == target.repo), None)
        if spec and spec.source and target.file in (None, spec.source.file):
            if target.file:
                self.layouts = (layout.OFFICIAL,)
            return self.member(spec, target.revision, collected=False)
        for shelf in self._hub(target.repo, target.revision):
            picks = self._named(shelf, target.file) if target.file else self._only(shelf, target.repo)
            if picks:
                break
        else:
            raise self._nothing(target)
        return self._around(shelf, picks[0], [shelf])

    def folder(self, path: Path) -> Located:
        if (path / _CARD).is_file():
            self._refuse_base()
            return self._located({COMPACT: _compact(path)}, ())
        shelf = Folder(path, own=True)
        picks = self._only(shelf, str(path))
        if not picks:
            raise WeightsError(
                f"got {path} without a transformer or an adapter, allowed a folder as diffusers saves it or one file "
                f"of weights ({', '.join(SUFFIXES)}), try the file itself"
            )
        return self._around(shelf, picks[0], [shelf, Folder(path.absolute().parent)])

    def file(self, path: Path) -> Located:
        refuse_pickle(path.name)
        if not path.name.lower().endswith((*SUFFIXES, ".safetensors.index.json")):
            raise BadInput(f"got {path}, allowed {', '.join(SUFFIXES)} or a folder, try one of these")
        shelf = Folder(path.parent, own=True)
        picks = self._named(shelf, path.name)
        if not picks:
            raise WeightsError(f"got {path}, which is no plain file that can be read, try another")
        # Beside it; in the diffusers layout and in collections the companions are its folder's neighbours.
        beside = [Folder(path.absolute().parent), Folder(path.absolute().parent.parent)]
        return self._around(shelf, picks[0], beside)

    # -------------------------------------------------------------------------- parts of these

    def _around(self, shelf: Shelf, pick: Pick, beside: Iterable[Shelf]) -> Located:
        """The files of one pick, with what they lack from elsewhere. What they hold is read from the file or, where
        that still has to be fetched, from its header; where the header does not say, the pick's own kind is believed
        until then."""
        from fluxloom.weights.identify import identify
        from fluxloom.weights.peek import peek, sha256_of

        header = peek(shelf, pick) if shelf.cost(pick) else None
        if header is not None:
            found = identify(header, sha256_of(shelf, pick))
        else:
            (part,) = self._delivered(shelf, [pick])
            found = [] if part.lacks else identified(part)
        held = tuple(dict.fromkeys(PARTS.get(one.kind, one.kind) for one in found)) or (pick.kind,)
        rest = self._rest(found, held, tuple(beside)) if self.companions else {}
        if header is not None:
            (part,) = self._delivered(shelf, [pick])
            found = found if part.lacks else identified(part)
        main = [one for one in found if PARTS.get(one.kind, one.kind) in (TRANSFORMER, ADAPTER)]
        candidates = tuple(dict.fromkeys(name for one in main for name in one.candidates))
        located = self._located({**{kind: replace(part, kind=kind) for kind in held}, **rest}, candidates)
        return replace(located, header=header if part.lacks else None)

    def _rest(self, found: Sequence[Component], held: Sequence[str], beside: Sequence[Shelf]) -> dict[str, Part]:
        """What a file lacks: the companions of a transformer; of an adapter, its own and its base."""
        if ADAPTER in held and self.under is not None:
            raise self.no_base("an adapter itself")
        if ADAPTER in held:
            return self._adapted(found, held, beside)
        self._refuse_base()
        if TRANSFORMER not in held:
            what = " and ".join(KINDS[kind].title if kind in KINDS else kind for kind in held)
            raise BadInput(
                f"got {self.reference}, which holds {what or 'no component'}, allowed a transformer or an adapter, "
                "try a reference to one of these"
            )
        kinds = [kind for kind in MODEL if kind not in held]
        return self._take(kinds, chain(beside, shelves.collections(), self._known()), None)

    def _adapted(self, found: Sequence[Component], held: Sequence[str], beside: Sequence[Shelf]) -> dict[str, Part]:
        """What an adapter needs besides itself; nothing, where it is a LoRA that is no member, and stands alone."""
        from fluxloom.weights.adapted import adapter_row

        adapter = next((one for one in found if PARTS.get(one.kind) == ADAPTER), None)
        if adapter is None or not (adapter.candidates or self.variant or self.base):
            return {}
        row = adapter_row(adapter, self.variant)
        assert row.source is not None, "every adapter is published"
        own = [kind for kind in layout.own_kinds(row) if kind not in held]
        places = chain(beside, shelves.collections(), self._hub(row.source.repo, None))
        return {**self._under(row, beside), **(self._take(own, places, row) if own else {})}

    def _delivered(self, shelf: Shelf, picks: Sequence[Pick]) -> list[Part]:
        return shelf.deliver(picks, self.progress) if self.fetch else [shelf.part(pick) for pick in picks]

    def _located(self, parts: Mapping[str, Part], candidates: tuple[str, ...]) -> Located:
        if self.variant and candidates and self.variant not in candidates:
            raise BadInput(
                f"got variant {self.variant} for {self.reference}, allowed {', '.join(candidates)}, try {candidates[0]}"
            )
        chosen = (self.variant,) if self.variant else candidates
        return Located(self.reference, MappingProxyType(dict(parts)), chosen, tuple(self.notes))

    def _named(self, shelf: Shelf, name: str) -> list[Pick]:
        """One file, or all shards that belong to it."""
        if name not in shelf.listing:
            return []
        names = layout.with_shards(shelf.listing, name)
        if not names:
            raise WeightsError(f"got {name} without all of its shards and their index, try fetching the rest")
        return [Pick(TRANSFORMER, name if len(names) == 1 else name.rpartition("/")[0], names)]

    def _only(self, shelf: Shelf, place: str) -> list[Pick]:
        """The one transformer, or file of weights, of an unnamed member; else what is itself one component."""
        found = layout.transformers(shelf.listing, None, self.layouts)
        single = layout.component_folder(shelf.listing)
        if single and not any("/" in name for pick in found for name in pick.names):
            return [single]
        found = found or layout.options(shelf.listing, ADAPTER, (layout.DIFFUSERS,))
        wanted = MODELS[self.variant].source if self.variant else None
        files = {spec.source.file for spec in MODELS.values() if spec.source}
        found = [pick for pick in found if wanted and pick.path == wanted.file] or found
        found = [pick for pick in found if pick.path in files] or found
        if len(found) > 1:
            rows = [f"{pick.path} ({size_text(pick.bytes(shelf.listing))})" for pick in found[:12]]
            name = found[0].path
            example = Path(place) / name if isinstance(shelf, Folder) else f"{place}:{name}"
            raise BadInput(f"got {place}, which holds several files: {', '.join(rows)}; name one, try {example}")
        return found

    def _take(
        self, kinds: Sequence[str], places: Iterable[Shelf], spec: ModelSpec | None, sha256: str | None = None
    ) -> dict[str, Part]:
        """Components from the first shelf that has each; nothing is fetched before all of them are found."""
        missing, chosen = list(kinds), list[tuple[Shelf, list[Pick]]]()
        for shelf in places:
            picks = [pick for kind in missing if (pick := self._best(shelf, kind, spec))]
            chosen.append((shelf, picks))
            missing = [kind for kind in missing if kind not in {pick.kind for pick in picks}]
            if all(KINDS[kind].optional for kind in missing):
                break
        else:
            raise self._missing([kind for kind in missing if not KINDS[kind].optional], spec)
        for shelf, picks in chosen:
            _check_published(shelf, picks, sha256)
        parts = [part for shelf, picks in chosen if picks for part in self._delivered(shelf, picks)]
        return {part.kind: part for part in sorted(parts, key=lambda part: kinds.index(part.kind))}

    def _best(self, shelf: Shelf, kind: str, spec: ModelSpec | None) -> Pick | None:
        """One of several that hold the same: what needs no fetching, then the preferred layout."""
        if kind in (TRANSFORMER, ADAPTER):
            if spec is None:
                return None
            main = layout.transformers(shelf.listing, spec, self.layouts) if shelf.own else []
            found = layout.published(shelf.listing, spec) if kind == ADAPTER or not shelf.own else main
        else:
            every = tuple(dict.fromkeys((*self.layouts, layout.OFFICIAL, layout.DIFFUSERS)))
            found = layout.options(shelf.listing, kind, every if shelf.flux else (layout.OFFICIAL,))
        return min(found, key=lambda pick: shelf.cost(pick) > 0, default=None)

    # -------------------------------------------------------------------------- shelves

    def _hub(self, repo: str, revision: str | None) -> Iterator[Shelf]:
        """A repository, as it is cached and as its hub lists it: the first where nothing may be asked or a commit
        cannot have changed, both where the hub does not answer."""
        asked = revision or _MAIN
        cached = self.hub.cached(repo, asked)
        fixed = COMMIT.fullmatch(asked) is not None
        if cached and (self.hub.offline or fixed):
            yield Remote(self.hub, cached)
        if self.hub.offline:
            return
        try:
            listed = self.hub.listed(repo, asked)
        except Unreachable as error:
            if not cached:
                raise
            self.notes.append(f"{error}; used what is cached of {repo}")
            if not fixed:
                yield Remote(self.hub, cached)
        else:
            yield Remote(self.hub, listed)

    def _known(self) -> Iterator[Shelf]:
        """What the cache holds of the publisher's repositories, which share encoders and autoencoder."""
        for repo in dict.fromkeys(spec.source.repo for spec in MODELS.values() if spec.source):
            if cached := self.hub.cached(repo, _MAIN):
                yield Remote(self.hub, cached, own=False)

    # -------------------------------------------------------------------------- errors

    def _missing(self, kinds: Sequence[str], spec: ModelSpec | None) -> Failure:
        """What is not there, and how to get it."""
        what = ", ".join(KINDS[kind].title for kind in kinds)
        after = f" ({'; '.join(self.notes)})" if self.notes else ""
        if spec and spec.source:
            names = [_name(kind, spec) for kind in kinds]
            if self.hub.offline:
                return Failure(
                    f"got {self.reference}, of which {', '.join(names)} ({what}) is not in the cache at "
                    f"{self.hub.cache}, allowed what was fetched before while offline, try once without --offline"
                )
            return WeightsError(
                f"got {spec.source.repo} without {what}{after}, allowed {', '.join(names)} in it, "
                f"or in a folder that {FOLDERS} names, try another revision"
            )
        free = next(s.source.repo for s in MODELS.values() if s.source and not s.source.gated)
        fetch = " ".join(f"--include '{_name(kind, None)}'" for kind in kinds)
        return WeightsError(
            f"got {self.reference} without {what}{after}, allowed beside it, in a folder that {FOLDERS} names or in "
            f"the cache, try `hf download {free} {fetch}`, which every member shares"
        )

    def _nothing(self, target: Repository) -> Failure | BadInput:
        if self.hub.offline:
            what = f"{target.repo}@{target.revision or _MAIN}:{target.file or '*'}"
            return Failure(
                f"got {what}, which is not in the cache at {self.hub.cache}, allowed what was fetched before while "
                "offline, try once without --offline"
            )
        listed = self.hub.listed(target.repo, target.revision or _MAIN)
        if target.file:
            return no_such_file(target.repo, target.file, tuple(listed.files))
        return WeightsError(
            f"got {target.repo}, which holds no transformer, allowed {', '.join(SUFFIXES)}, try owner/name:file"
        )


def _name(kind: str, spec: ModelSpec | None) -> str:
    """What publishers call a component's file, or folder."""
    if kind in (TRANSFORMER, ADAPTER) and spec and spec.source:
        return spec.source.file
    row = KINDS[kind]
    return row.files[0] if kind == "autoencoder" else f"{row.folders[0]}/*"


def _check_published(shelf: Shelf, picks: Sequence[Pick], sha256: str | None) -> None:
    """Before 24 GB are fetched: is this the file whose hash the publisher printed?"""
    if not sha256 or not isinstance(shelf, Remote):
        return
    for pick in picks:
        file = shelf.snapshot.files[pick.names[0]]
        official = len(pick.names) == 1 and pick.kind in (TRANSFORMER, ADAPTER)
        if official and len(file.etag) == len(sha256) and file.etag != sha256:
            raise WeightsError(
                f"got {file.name} of {shelf.snapshot.repo} with sha256 {file.etag}, allowed {sha256}, which its "
                f"publisher printed; if you trust this one, name its revision: {shelf.snapshot.repo}@"
                f"{shelf.snapshot.commit}"
            )


def _compact(path: Path) -> Part:
    return Part(COMPACT, path, tuple(sorted(p for p in path.iterdir() if p.is_file())), str(path))


def identified(part: Part) -> list[Component]:
    """What a part's file or folder holds. Raises WeightsError for what is no part of a FLUX.1 model."""
    from fluxloom.weights.checkpoint import open_checkpoint
    from fluxloom.weights.identify import identify

    return identify(open_checkpoint(part.path), part.sha256)
