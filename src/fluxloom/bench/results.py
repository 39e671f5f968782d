"""What a run leaves: one JSON file with its date, machine and versions, complete after every row."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fluxloom.errors import BadInput, OutputError
from fluxloom.infer.receipt import processor, system

SCHEMA = 1
Row = dict[str, Any]
# Everything that a row's figure may go through; what is not installed is left out.
_PACKAGES = ("torch", "triton", "numpy", "diffusers", "transformers", "accelerate", "torchao", "cache-dit", "fluxbfl",
             "fa3-fwd", "onnxruntime", "openvino")  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of python, fluxloom, and the packages that take part."""
    import fluxloom

    found = {"python": platform.python_version(), "fluxloom": fluxloom.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return found


def machine(device: torch.device) -> Row:
    """The device by name, and what shares the work with it."""
    facts: Row = {"device": device.type, "processor": processor(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"name": properties.name, "gpu_bytes": properties.total_memory}
    else:
        facts |= {"name": processor()}
    return facts | {"system": system()}


@dataclass
class Results:
    """A run: ``what`` was measured, its ``facts``, and its rows.

    path  where it is kept from row to row, so that a run that is cut short leaves what it had; None: nowhere
    """

    what: str
    facts: Row
    rows: list[Row] = field(default_factory=list)
    path: Path | None = None

    @classmethod
    def begin(cls, what: str, device: torch.device, path: Path | None = None, **facts: Any) -> Results:
        """With today's date, this machine and the versions. Raises OutputError where ``path`` cannot be written."""
        head = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(device),
            "versions": versions(),
            **facts,
        }
        begun = cls(what, head, [], path)
        begun.save()
        return begun

    def add(self, row: Mapping[str, Any]) -> Row:
        """Keep a row."""
        self.rows.append(dict(row))
        self.save()
        return self.rows[-1]

    def note(self, **facts: Any) -> None:
        """Keep facts of the whole run."""
        self.facts |= facts
        self.save()

    def to_dict(self) -> Row:
        return {"schema": SCHEMA, "what": self.what, **self.facts, "rows": self.rows}

    def save(self) -> None:
        """Write the file anew, at once or not at all."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(f".{self.path.name}.part")
            part.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", "utf-8")
            part.replace(self.path)
        except OSError as fault:
            raise OutputError(
                f"got {str(self.path)!r} to write to ({fault.strerror}), allowed a place with room, try another --json"
            ) from fault


def read(path: Path) -> Row:
    """A file that :class:`Results` wrote. Raises BadInput for another."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as fault:
        raise BadInput(f"got {path} ({fault}), allowed a file of `fluxloom bench --json`, try another") from fault
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("rows"), list):
        raise BadInput(f"got {path}, allowed a file of `fluxloom bench --json` of schema {SCHEMA}, try another")
    return found
