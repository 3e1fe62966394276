"""One small classifier for every test that needs a trained one: made once a session, in about ten seconds."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from export.repository import Repository


hypothesis.settings.register_profile("tenet", deadline=None)  # a slow example tells of a busy machine
hypothesis.settings.load_profile("tenet")

# A shell that runs pytest in the background has it ignore Ctrl-C, and processes inherit that; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Shapes in these modules' annotations are checked at each call. The hook must come before their first import, so it
# stands here; models are left out because torch.fx traces them.
install_import_hook(
    [
        "training.adversarial",
        "training.archives",
        "training.augment",
        "training.augmix",
        "training.batches",
        "training.data",
        "training.datasets",
        "training.explain",
        "training.grad_cam",
        "training.grouping",
        "training.inhibition",
        "training.npz",
        "training.stream",
    ],
    "beartype.beartype",
)

_RECIPE = """
[data]
name = "digits"
[model]
depth = 8
width = 8
[training]
epochs = 6
batch_size = 32
learning_rate = 0.1
threads = 1
[tenet]
stage = "layer2"
start = 40
"""


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RUN folder of a network that reads digits."""
    from training import loop, recipe

    folder: Path = tmp_path_factory.mktemp("runs")
    (folder / "recipe.toml").write_text(_RECIPE)
    for _ in loop.train(recipe.read(folder / "recipe.toml"), out=folder / "digits"):
        pass
    return folder / "digits"


@pytest.fixture(scope="session")
def digits_models(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository with `digits` (fp32) and `digits-int8`; tests that publish make their own copy."""
    from export import publish
    from export.repository import Repository
    from export.variant import Variant, publish_variant

    repository = Repository(tmp_path_factory.mktemp("models"))
    fp32 = publish.publish_checkpoint(digits_run, repository=repository, name="digits")
    publish_variant(fp32, repository=repository, name="digits-int8", variant=Variant("int8"))
    return repository


@pytest.fixture
def own_models(digits_models: Repository, tmp_path: Path) -> Repository:
    """A copy of the repository, to change."""
    import shutil

    from export.repository import Repository

    shutil.copytree(digits_models.folder, tmp_path / "models")
    return Repository(tmp_path / "models")
