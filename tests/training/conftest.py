from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from training.recipe import Recipe

GOLDEN = Path(__file__).parents[1] / "golden" / "tenet_golden.npz"  # made by the published implementation
COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 70), "red": (210, 40, 50)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[0, 1, 2], ids="case{}".format)
def golden(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    """Inputs and outputs of the published implementation, by name."""
    prefix = f"case{request.param}_"
    with np.load(GOLDEN) as file:
        return {name.removeprefix(prefix): torch.from_numpy(file[name]) for name in file if name.startswith(prefix)}


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder that is learned in a second: noisy squares of three colours."""
    root: Path = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 5)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.normal(colour, 40, size=(12, 12, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def template(colours: Path) -> dict[str, Any]:
    return {
        "data": {"name": "folder", "root": str(colours), "validation": 0.25},
        "model": {"depth": 8, "width": 4},
        "training": {"epochs": 4, "batch_size": 8, "learning_rate": 0.05, "threads": 1},
        "augmentation": {"crop_padding": 1},
        "tenet": {"stage": "layer2", "groups": 3, "interval": 2, "start": 2},
    }


@pytest.fixture
def document(template: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain values, for a test to change."""
    return copy.deepcopy(template)


@pytest.fixture
def recipe(document: dict[str, Any]) -> Recipe:
    from training.recipe import decode

    return decode(document, source="recipe")
