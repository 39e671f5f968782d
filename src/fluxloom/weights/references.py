"""What a model reference names: a member, a repository of a hub, or a path."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fluxloom.core.specs import MODELS, ModelSpec
from fluxloom.errors import BadInput, UnknownModel, WeightsError
from fluxloom.weights import layout
from fluxloom.weights.layout import SUFFIXES

_HOME = "huggingface.co"
_REPOSITORY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[^:\\]+))?")
_PAGE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?:blob|resolve|tree|raw)/(?P<revision>[^/]+)(?:/(?P<file>.+))?)?/?")


@dataclass(frozen=True)
class Repository:
    """A repository of a hub; a revision that nobody named is None."""

    repo: str
    revision: str | None = None
    file: str | None = None


def parse(reference: str | os.PathLike[str], endpoint: str) -> ModelSpec | Repository | Path:
    """What a reference refers to; reads nothing but whether a path exists. Raises UnknownModel, BadInput."""
    text = os.fspath(reference)
    if isinstance(reference, os.PathLike):
        return _existing(Path(text))
    if text in MODELS:
        return MODELS[text]
    if text.startswith(("http://", "https://")):
        return _page(text, endpoint)
    path = Path(text).expanduser()
    match = _REPOSITORY.fullmatch(text)
    file = text.lower().endswith((*SUFFIXES, *layout.PICKLES)) and not (match and match["file"])
    if text.startswith((".", "~")) or file or path.is_absolute() or path.exists():
        return _existing(path)
    if match:
        return checked(match["repo"], match["revision"], match["file"])
    hint = next(iter(get_close_matches(text.lower(), MODELS, n=1, cutoff=0.4)), None)
    raise UnknownModel(
        f"got model {text!r}, allowed {', '.join(MODELS)}, owner/name[@revision][:file], a folder or a file that "
        f"exists, try {hint or 'nano'}"
    )


def _existing(path: Path) -> Path:
    path = path.expanduser()
    if not path.exists():
        near = get_close_matches(path.name, os.listdir(path.parent) if path.parent.is_dir() else [], n=1)
        raise UnknownModel(f"got {path}, which does not exist, try {path.parent / near[0] if near else 'another path'}")
    return path


def _page(url: str, endpoint: str) -> Repository:
    """The address of a repository's page, or of a file's."""
    parts = urlsplit(url)
    home = urlsplit(endpoint)
    hosts = {_HOME: "", f"www.{_HOME}": "", "hf.co": "", home.netloc: home.path.rstrip("/")}
    base = hosts.get(parts.netloc)
    if base is None or not parts.path.startswith(f"{base}/"):
        raise BadInput(f"got {url}, allowed addresses at {_HOME} or {endpoint}, try owner/name, or set HF_ENDPOINT")
    match = _PAGE.fullmatch(parts.path[len(base) + 1 :])
    if not match:
        raise BadInput(f"got {url}, allowed .../owner/name or .../owner/name/blob/revision/file, try owner/name")
    return checked(match["repo"], match["revision"] and unquote(match["revision"]), match["file"])


def checked(repo: str, revision: str | None, file: str | None) -> Repository:
    file = unquote(file) if file else None
    for text in (repo, revision or "", file or ""):
        if ".." in text or text.startswith("/"):
            raise BadInput(f"got {text!r}, allowed plain names, try owner/name@revision:file")
    if file:
        refuse_pickle(file)
    return Repository(repo, revision, file)


def refuse_pickle(name: str) -> None:
    if name.lower().endswith(layout.PICKLES):
        raise WeightsError(
            f"got {name}, a pickle, which could run any code, allowed {', '.join(SUFFIXES)}, try a repository that has "
            "one of these, or convert it where that can do no harm: "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')"
        )
