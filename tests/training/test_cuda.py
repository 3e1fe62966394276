"""Training on an NVIDIA GPU: the same results as on a CPU, within what its arithmetic allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.training.runs import changed, leave, weights
from training import augment, augmix, checkpoint, datasets, grouping, inhibition, iteration, loop
from training.events import EpochEnded, TrainingEnded
from training.recipe import AugMix
from training.stream import Stream

if TYPE_CHECKING:
    from training.recipe import Recipe

pytestmark = pytest.mark.gpu

REGIMES: dict[str, dict[str, Any]] = {
    "tenet": {},
    "paper": {"tenet": {"variant": "paper"}},
    "exact": {"tenet": {"exact": True}},
    "fused": {"tenet": {"fused": True}},
    "bf16, channels last": {"training": {"precision": "bf16", "channels_last": True}},
    "compiled": {"training": {"compile": True}},
    "adamw and average": {"training": {"optimizer": "adamw", "learning_rate": 0.01, "ema": 0.9, "clip_norm": 1.0}},
    "augmix": {"augmentation": {"augmix": {"width": 2}, "cutout": 4, "random_erasing": 0.5, "flip": True}},
    "free": {"adversarial": {"method": "free", "replays": 2}},
    "pgd": {"adversarial": {"method": "pgd", "epsilon": "4/255", "steps": 2}},
}


def trained(recipe: Recipe, out: Path, *, device: str = "cuda", resume: bool = False) -> TrainingEnded:
    *_, ended = loop.train(recipe, out=out, device=device, resume=resume)
    assert isinstance(ended, TrainingEnded)
    return ended


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_learns(document: dict[str, Any], tmp_path: Path, regime: str) -> None:
    ended = trained(changed(document, **REGIMES[regime]), tmp_path / "run")
    assert ended.test_accuracy > 0.6  # chance is a third
    assert ended.tenet_steps > 0
    assert all(bool(tensor.isfinite().all()) for tensor in weights(tmp_path / "run").values())


def test_a_first_epoch_is_that_of_a_cpu(document: dict[str, Any], tmp_path: Path) -> None:
    recipe = changed(document, training={"epochs": 1}, tenet={"start": 4})
    first = {
        device: next(e for e in loop.train(recipe, out=tmp_path / device, device=device) if isinstance(e, EpochEnded))
        for device in ("cpu", "cuda")
    }
    assert first["cuda"].loss == pytest.approx(first["cpu"].loss, rel=1e-2)


@pytest.mark.parametrize("regime", ["tenet", "free", "adamw and average"])
def test_a_resumed_run_goes_on_where_it_was(document: dict[str, Any], tmp_path: Path, regime: str) -> None:
    recipe = changed(document, **REGIMES[regime])
    leave(loop.train(recipe, out=tmp_path / "run", device="cuda"), after=2)
    ended = trained(recipe, tmp_path / "run", resume=True)
    assert ended.iterations == 16 * (2 if regime == "free" else 1)
    assert ended.test_accuracy > 0.6


def test_a_run_of_a_gpu_is_loaded_without_one(recipe: Recipe, tmp_path: Path) -> None:
    ended = trained(recipe, tmp_path / "run")
    model = checkpoint.load(ended.folder).model
    test = datasets.load("folder", split="test", root=Path(str(recipe.data.root)))
    images, labels = augment.unit_range(torch.from_numpy(test.images)), torch.from_numpy(test.labels)
    with torch.inference_mode():
        accuracy = float((model(images).argmax(1) == labels).float().mean())
    assert accuracy == pytest.approx(ended.test_accuracy, abs=0.07)  # one image of 15 may lie on an edge


def test_an_iteration_waits_for_the_device_only_where_tenet_counts_its_images(
    document: dict[str, Any], tmp_path: Path
) -> None:
    recipe = changed(
        document, augmentation={"crop_padding": 1, "flip": True, "cutout": 4, "random_erasing": 0.5}, tenet=None
    )
    events = loop.train(recipe, out=tmp_path / "run", device="cuda")
    next(event for event in events if isinstance(event, EpochEnded))
    waits = iteration.Iteration.__call__

    def watched(self: iteration.Iteration, images: torch.Tensor, labels: torch.Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            waits(self, images, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iteration.Iteration, "__call__", watched)
        assert isinstance(list(events)[-1], TrainingEnded)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_groups_and_maps_are_those_of_a_cpu() -> None:
    features, gradients = torch.randn(2, 32, 128, 16, 16, generator=seeded())
    initial = grouping.random_subset(32, 128, 6, generator=seeded())
    ids = {d: grouping.group_channels(features.to(d), 6, initial=initial)[0].cpu() for d in ("cpu", "cuda")}
    assert (ids["cpu"] == ids["cuda"]).float().mean() > 0.99
    maps = {
        d: inhibition.reversed_map(
            features.to(d), gradients.to(d), ids["cpu"].to(d), groups=6, variant="published"
        ).cpu()
        for d in ("cpu", "cuda")
    }
    assert torch.allclose(maps["cpu"], maps["cuda"], atol=1e-3)


def test_mixed_images_are_those_of_a_cpu() -> None:
    images = torch.randint(256, (16, 32, 32, 3), dtype=torch.uint8, generator=seeded())
    mixed = {d: augmix.mix(images.to(d), AugMix(), stream=Stream(seeded())).cpu() for d in ("cpu", "cuda")}
    assert (mixed["cpu"] - mixed["cuda"]).abs().max() <= 2 / 255
