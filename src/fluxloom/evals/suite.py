"""One evaluation from plan to report: which cases, run on which model, and the files that tell of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fluxloom
from fluxloom.errors import BadInput
from fluxloom.evals.cases import DEV_SEED, EDIT, Part, chosen, part_of, seed_from
from fluxloom.evals.report import BARS, entries, markdown, summarise
from fluxloom.evals.sheet import sheet
from fluxloom.evals.world import Outcome, Reader, evaluate, rendered
from fluxloom.infer.files import encode, write
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.receipt import versions

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run, on what.

    part      dev, for work on the model, or test, whose seed follows from the weights' hash
    seed      of the cases
    count     of each group
    settings  fields of the requests, where not the model's own
    """

    pipeline: Pipeline
    reader: Reader
    part: Part
    seed: int
    count: int
    groups: tuple[str, ...]
    batch: int = 1
    settings: dict[str, Any]

    @classmethod
    def of(
        cls, pipeline: Pipeline, reader: Reader, part: str, seed: int | None, only: Sequence[str] = (), **more: Any
    ) -> Plan:
        """A plan with the seed of its part and the groups that names stand for. Raises BadInput for unknown ones."""
        known = part_of(part)
        if known == "test" and seed is not None:
            raise BadInput(f"got seed {seed} for test, whose seed the weights decide, allowed for dev, try without")
        own = seed_from(pipeline.runtime.content) if known == "test" else DEV_SEED if seed is None else seed
        return cls(pipeline=pipeline, reader=reader, part=known, seed=own, groups=chosen(only), **more)

    @property
    def total(self) -> int:
        """How many pictures the model draws."""
        return self.count * len(self.groups)

    def run(self, keep: int = 0) -> Iterator[Outcome]:
        """Every outcome as it is reached; the first ``keep`` of each group with their pictures."""
        workers = min(15, os.cpu_count() or 1) if self.batch > 1 else 0
        asked = rendered(self.part, self.seed, self.count, self.groups, workers)
        return evaluate(asked, self.pipeline, self.reader, self.batch, keep, self.settings)

    def facts(self) -> dict[str, Any]:
        """What a reader of the report has to know."""
        runtime = self.pipeline.runtime
        return {
            "model": runtime.spec.name,
            "weights": runtime.content,
            "recogniser": self.reader.content,
            "split": self.part,
            "seed": self.seed,
            "cases of each group": self.count,
            "settings": self.settings,
            "batch": self.batch,
            "fluxloom": fluxloom.__version__,
            "versions": versions(),
            "machine": runtime.machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def write_report(folder: Path, plan: Plan, outcomes: Sequence[Outcome]) -> list[Path]:
    """report.md, report.json and the sheets of what was drawn and edited; returns their paths.

    Raises OutputError where the folder cannot be written to.
    """
    summary, facts = summarise(outcomes), plan.facts()
    bars = [bar.judge(summary) for bar in BARS]
    whole = {"schema": SCHEMA, **facts, "bars": bars, **summary.to_dict(), "cases": entries(outcomes)}
    paths = [
        write(folder / "report.md", markdown(summary, facts).encode()),
        write(folder / "report.json", json.dumps(whole, ensure_ascii=False, indent=1).encode()),
    ]
    for name, edits in (("draw", False), ("edit", True)):
        shown = [outcome for outcome in outcomes if outcome.case.group.startswith(EDIT) == edits]
        if shown:
            paths.append(write(folder / f"sheet-{name}.webp", encode(sheet(shown), "WEBP", quality=90)))
    return paths
