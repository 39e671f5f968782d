"""Many trajectories in step: whatever they ask for at the same time is answered by one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from fluxloom.infer.sample import Evaluate, Trajectory

Velocities = Callable[[Sequence[Evaluate]], Sequence[Sequence[Tensor]]]


def lockstep(runs: Sequence[Trajectory], velocities: Velocities) -> list[Tensor]:
    """Drive trajectories to their ends together; returns the final x of each.

    ``velocities`` is asked for evaluations of equal shape at once, whatever their times; trajectories of other shapes,
    or with more steps than the rest, have calls of their own. Steps are passed over: nobody watches a batch.
    """
    ends: dict[int, Tensor] = {}
    answers: dict[int, Sequence[Tensor] | None] = dict.fromkeys(range(len(runs)))
    while answers:
        asked: dict[int, Evaluate] = {}
        for number, answer in answers.items():
            try:
                asked[number] = _advance(runs[number], answer)
            except StopIteration as end:
                ends[number] = end.value
        groups: dict[Hashable, list[int]] = {}
        for number, event in asked.items():
            groups.setdefault(_shape(event), []).append(number)
        answers = {}
        for numbers in groups.values():
            answers.update(zip(numbers, velocities([asked[number] for number in numbers]), strict=True))
    return [ends[number] for number in range(len(runs))]


def _advance(run: Trajectory, answer: Sequence[Tensor] | None) -> Evaluate:
    """The next evaluation that a trajectory waits for; StopIteration carries its end."""
    event = run.send(answer)
    while not isinstance(event, Evaluate):
        event = next(run)
    return event


def _shape(event: Evaluate) -> Hashable:
    """What evaluations must have in common to share a forward pass."""
    row = event.rows[0]
    context = None if row.context is None else row.context.shape
    return event.x.shape, row.text.tokens.shape, context, row.guidance is None
