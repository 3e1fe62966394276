"""Short training runs, for tests to start, compare and leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from training import checkpoint, loop
from training.events import EpochEnded, Event, TrainingEnded
from training.recipe import Recipe, decode

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def run(recipe: Recipe, out: Path, *, resume: bool = False) -> tuple[list[EpochEnded], TrainingEnded]:
    *events, ended = loop.train(recipe, out=out, resume=resume)
    assert isinstance(ended, TrainingEnded)
    return [event for event in events if isinstance(event, EpochEnded)], ended


def changed(document: dict[str, Any], **sections: dict[str, Any] | None) -> Recipe:
    """The document with keys of some sections changed; a section that is None is left out."""
    names = [name for name in {*document, *sections} if sections.get(name, {}) is not None]
    merged = {name: document.get(name, {}) | (sections.get(name) or {}) for name in names}
    return decode(merged, source="changed")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder).model.state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def leave(events: Iterable[Event], *, after: int) -> None:
    """Take the events of some epochs and drop the rest, as a crash does."""
    iterator = iter(events)
    while after:
        after -= isinstance(next(iterator), EpochEnded)
    del iterator
