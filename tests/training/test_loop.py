from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from training import checkpoint, data, inhibition, loop
from training.recipe import Recipe, decode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def run(recipe: Recipe, out: Path) -> tuple[list[loop.EpochEnded], loop.TrainingEnded]:
    *epochs, ended = loop.train(recipe, out=out)
    assert isinstance(ended, loop.TrainingEnded)
    return [event for event in epochs if isinstance(event, loop.EpochEnded)], ended


def changed(document: dict[str, Any], **sections: dict[str, Any]) -> Recipe:
    merged = {name: document.get(name, {}) | sections.get(name, {}) for name in {*document, *sections}}
    return decode(merged, source="changed")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder).model.state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def leave(events: Iterable[loop.Event], *, after: int) -> None:
    """Take some events and drop the rest, as Ctrl-C does."""
    iterator = iter(events)
    list(itertools.islice(iterator, after))
    del iterator


def test_training_learns_and_tells_how(recipe: Recipe, tmp_path: Path) -> None:
    epochs, ended = run(recipe, tmp_path / "run")
    assert [event.epoch for event in epochs] == [1, 2, 3, 4]
    assert all(event.epochs == 4 for event in epochs)
    assert epochs[-1].loss < epochs[0].loss
    assert epochs[-1].correct > 0.9
    assert ended.test_accuracy > 0.9
    assert ended.iterations == 4 * (36 // 8)
    assert 6 <= ended.tenet_steps == epochs[-1].tenet_steps <= ended.iterations // 2
    assert epochs[ended.best_epoch - 1].validation_accuracy == ended.validation_accuracy
    assert max(event.validation_accuracy for event in epochs) == ended.validation_accuracy


def test_events_are_lines_of_text(tmp_path: Path) -> None:
    epoch = loop.EpochEnded(1, 20, 2.2969, 0.3204, 0.1693, 1 / 3, 0, 1.2)
    ended = loop.TrainingEnded(tmp_path, 0.98812, 1.0, 20, 44.1, 224, 720, "")
    assert str(epoch) == "loss 2.297, TENET loss 0.320, validation accuracy 33.33%"
    assert str(dataclasses.replace(epoch, tenet_loss=None)) == "loss 2.297, validation accuracy 33.33%"
    assert str(ended) == ("test accuracy 98.81% (epoch 20, validation 100.00%), 720 iterations, 224 TENET steps, 44 s")


@pytest.mark.parametrize(
    ("timing", "expected"),
    [
        ({"start": 0, "interval": 5}, [5, 10, 15]),
        ({"start": 2, "interval": 2}, [2, 4, 6, 8, 10, 12, 14, 16]),
        ({"start": 5, "interval": 3}, [6, 9, 12, 15]),
    ],
)
def test_tenet_follows_each_interval_th_iteration_from_its_start(
    document: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    timing: dict[str, int],
    expected: list[int],
) -> None:
    ordinary: list[tuple[torch.Tensor, torch.Tensor]] = []  # each iteration's images and logits, epoch after epoch
    steps: list[int] = []

    class Recorded(inhibition.TenetStep):
        def __init__(self, model: torch.nn.Module, **settings: Any) -> None:
            super().__init__(model, **settings)
            model.register_forward_hook(
                lambda model, images, logits: ordinary.append((*images, logits)) if model.training else None
            )

        def __call__(self, images: torch.Tensor, labels: torch.Tensor, *, logits: torch.Tensor) -> torch.Tensor | None:
            steps.append(len(ordinary))
            assert torch.equal(images, ordinary[-1][0])
            assert torch.equal(logits, ordinary[-1][1])
            assert not logits.requires_grad
            return super().__call__(images, labels, logits=logits)

    monkeypatch.setattr(loop, "TenetStep", Recorded)
    run(changed(document, tenet=timing), tmp_path / "run")
    assert len(ordinary) == 16
    assert steps == expected


def pixels(images: Iterable[torch.Tensor]) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_the_best_epoch_is_picked_on_held_out_images_and_tested_once(
    recipe: Recipe, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.2, 0.9, 0.5, 0.3, 0.6])
    evaluated: list[set[bytes]] = []
    states: list[dict[str, torch.Tensor]] = []
    trained: list[set[bytes]] = []
    batches = data.batches

    def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
        assert len(images) == len(labels)
        evaluated.append(pixels(images))
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return next(scores)

    def recorded(images: torch.Tensor, labels: torch.Tensor, **settings: Any) -> Iterator[Any]:
        trained.append(pixels(images))
        return batches(images, labels, **settings)

    monkeypatch.setattr(loop, "_accuracy", accuracy)
    monkeypatch.setattr(data, "batches", recorded)
    _, ended = run(recipe, tmp_path / "run")
    assert (ended.best_epoch, ended.validation_accuracy, ended.test_accuracy) == (2, 0.9, 0.6)
    metrics = checkpoint.load(ended.folder).metrics
    assert (metrics["best_epoch"], metrics["validation_accuracy"], metrics["test_accuracy"]) == (2, 0.9, 0.6)
    assert same(weights(ended.folder), states[1])
    assert same(states[4], states[1])
    assert not same(states[3], states[1])
    whole, test = (
        pixels(torch.from_numpy(data.load("folder", split=split, root=colours).images)) for split in data.SPLITS
    )
    assert evaluated[4] == test
    assert all(held == evaluated[0] for held in evaluated[:4])
    assert all(kept == whole - evaluated[0] for kept in trained)
    assert len(evaluated[0]) == 12


def test_a_run_is_a_checkpoint_with_its_recipe(recipe: Recipe, tmp_path: Path) -> None:
    _, ended = run(recipe, tmp_path / "deep" / "run")
    loaded = checkpoint.load(ended.folder)
    assert loaded.recipe == recipe
    assert loaded.class_names == ("blue", "green", "red")
    assert loaded.input_shape == (3, 12, 12)
    assert loaded.metrics["test_accuracy"] == ended.test_accuracy
    assert loaded.metrics["test_images"] == 15
    assert loaded.sha256 == ended.sha256
    assert [path.name for path in ended.folder.parent.iterdir()] == ["run"]


def test_a_seed_is_a_run(document: dict[str, Any], tmp_path: Path) -> None:
    torch.rand(3)  # where PyTorch's own random state stands is of no matter
    _, first = run(changed(document), tmp_path / "first")
    torch.rand(5)
    _, again = run(changed(document), tmp_path / "again")
    _, other = run(changed(document, training={"seed": 1}), tmp_path / "other")
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256


def test_training_leaves_global_state_alone(recipe: Recipe, tmp_path: Path) -> None:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    run(recipe, tmp_path / "run")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("done", [1, 2, 4])
def test_resumed_equals_uninterrupted(recipe: Recipe, tmp_path: Path, done: int) -> None:
    _, whole = run(recipe, tmp_path / "whole")
    leave(loop.train(recipe, out=tmp_path / "parts"), after=done)
    assert [path.name for path in tmp_path.glob("parts*")] == ["parts.partial"]
    *epochs, ended = loop.train(recipe, out=tmp_path / "parts", resume=True)
    assert isinstance(ended, loop.TrainingEnded)
    assert len(epochs) == 4 - done
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert (ended.sha256, ended.tenet_steps) == (whole.sha256, whole.tenet_steps)
    assert ended.best_epoch == whole.best_epoch
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_an_interrupt_in_an_epoch_leaves_no_half_written_run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = loop.train(recipe, out=tmp_path / "run")
    next(events)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.data.unit_range", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(events)
    assert [path.name for path in tmp_path.iterdir()] == ["run.partial"]


def test_what_is_there_is_not_overwritten(recipe: Recipe, tmp_path: Path) -> None:
    leave(loop.train(recipe, out=tmp_path / "run"), after=1)
    with pytest.raises(FileExistsError, match="go on with it with --resume, or remove it"):
        loop.train(recipe, out=tmp_path / "run")
    (tmp_path / "done").mkdir()
    with pytest.raises(FileExistsError, match="done: exists already"):
        loop.train(recipe, out=tmp_path / "done", resume=True)
    with pytest.raises(FileNotFoundError, match="expected an interrupted run, got none"):
        loop.train(recipe, out=tmp_path / "fresh", resume=True)


def test_another_recipe_is_not_resumed(document: dict[str, Any], tmp_path: Path) -> None:
    leave(loop.train(changed(document), out=tmp_path / "run"), after=1)
    other = changed(document, training={"epochs": 5})
    with pytest.raises(ValueError, match=r"expected the recipe that the run began with.*in training; restore"):
        list(loop.train(other, out=tmp_path / "run", resume=True))


@pytest.fixture
def own_colours(colours: Path, tmp_path: Path) -> Path:
    """A copy of the image folder, to change."""
    return Path(shutil.copytree(colours, tmp_path / "colours"))


def test_other_data_are_not_resumed(document: dict[str, Any], own_colours: Path, tmp_path: Path) -> None:
    recipe = changed(document, data={"root": str(own_colours)})
    leave(loop.train(recipe, out=tmp_path / "run"), after=1)
    Image.new("RGB", (12, 12)).save(own_colours / "test" / "red" / "0.png")
    with pytest.raises(ValueError, match=r"expected the data that the run began with, got a change in test; restore"):
        list(loop.train(recipe, out=tmp_path / "run", resume=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, _: tensors.pop("generator.centres"),
        lambda tensors, _: tensors.pop("model.fc.weight"),
        lambda tensors, _: tensors.update({"generator.shuffling": torch.zeros(3, dtype=torch.uint8)}),
        lambda _, record: record.pop("data"),
        lambda _, record: record.update(recipe=[]),
        lambda _, record: record["progress"].update(extra=1),
    ],
)
def test_an_interrupted_run_with_other_contents_is_one_line(recipe: Recipe, tmp_path: Path, change: Any) -> None:
    leave(loop.train(recipe, out=tmp_path / "run"), after=1)
    tensors, record = checkpoint.load_partial(tmp_path / "run.partial")
    change(tensors, record)
    checkpoint.save_partial(tmp_path / "run.partial", tensors=tensors, record=record)
    with pytest.raises(ValueError, match=r"damaged file; remove .*run\.partial and start again") as caught:
        list(loop.train(recipe, out=tmp_path / "run", resume=True))
    assert "\n" not in str(caught.value)


def test_a_test_split_that_does_not_fit_is_noticed_before_training(
    document: dict[str, Any], own_colours: Path, tmp_path: Path
) -> None:
    recipe = changed(document, data={"root": str(own_colours)})
    for path in (own_colours / "test").glob("*/*.png"):
        Image.new("RGB", (12, 10)).save(path)
    with pytest.raises(ValueError, match=r"data\.root: .* \(12, 12, 3\), in the test split, got \(10, 12, 3\)"):
        next(loop.train(recipe, out=tmp_path / "run"))
    (own_colours / "test" / "red").rename(own_colours / "test" / "reed")
    with pytest.raises(ValueError, match=r"data\.root: expected the classes .*'red'.* got .*'reed'"):
        next(loop.train(recipe, out=tmp_path / "run"))
    shutil.rmtree(own_colours / "test")
    with pytest.raises(FileNotFoundError, match="test: no such folder"):
        next(loop.train(recipe, out=tmp_path / "run"))
    assert not list(tmp_path.glob("run*"))


def test_a_place_that_cannot_be_written_to_is_refused_at_once(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a place in a folder, got one under the file"):
        loop.train(recipe, out=tmp_path / "file" / "deep" / "run")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match="expected a place that can be written to"):
        loop.train(recipe, out=tmp_path / "deep" / "run")


@pytest.fixture(scope="module")
def short(template: dict[str, Any]) -> dict[str, Any]:
    return template | {"training": template["training"] | {"epochs": 2}}


@pytest.fixture(scope="module")
def plain(short: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that the short recipe leads to."""
    _, ended = run(changed(short), tmp_path_factory.mktemp("plain") / "run")
    return weights(ended.folder)


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("data", {"validation": 0.5}),
        ("model", {"depth": 14}),
        ("model", {"width": 5}),
        ("model", {"mean": [0.1, 0.5, 0.5]}),
        ("model", {"std": [0.5, 0.5, 0.5]}),
        ("training", {"epochs": 3}),
        ("training", {"batch_size": 12}),
        ("training", {"learning_rate": 0.04}),
        ("training", {"weight_decay": 0.1}),
        ("training", {"momentum": 0.0}),
        ("training", {"schedule": "constant"}),
        ("training", {"seed": 3}),
        ("training", {"crop_padding": 0}),
        ("training", {"flip": True}),
        ("tenet", {"stage": "layer1"}),
        ("tenet", {"groups": 4}),
        ("tenet", {"variant": "paper"}),
        ("tenet", {"interval": 3}),
        ("tenet", {"start": 6}),
        ("tenet", {"lambda_tenet": 0.2}),
        ("tenet", {"lambda_orth": 0.01}),
        ("tenet", {"exact": True}),
    ],
    ids=str,
)
def test_every_option_has_an_effect(
    short: dict[str, Any],
    plain: dict[str, torch.Tensor],
    tmp_path: Path,
    section: str,
    change: dict[str, Any],
) -> None:
    _, ended = run(changed(short, **{section: change}), tmp_path / "run")
    other = weights(ended.folder)
    assert plain.keys() != other.keys() or not all(torch.equal(plain[name], other[name]) for name in plain)


def test_threads_are_those_of_the_recipe(document: dict[str, Any], tmp_path: Path) -> None:
    events = loop.train(changed(document, training={"threads": 2}), out=tmp_path / "run")
    next(events)
    assert torch.get_num_threads() == 2
    del events
    assert torch.get_num_threads() == 1


def test_without_tenet_there_are_no_tenet_steps(document: dict[str, Any], tmp_path: Path) -> None:
    del document["tenet"]
    epochs, ended = run(changed(document), tmp_path / "run")
    assert ended.tenet_steps == 0
    assert all(event.tenet_loss is None for event in epochs)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tenet": {"start": 500}}, r"tenet\.start: expected a TENET step in the run's 16 iterations"),
        ({"tenet": {"stage": "layer7"}}, "stage: expected a submodule of the model"),
        ({"tenet": {"start": 16, "interval": 3}}, r"none from 16 with interval 3"),
        ({"tenet": {"start": 0, "interval": 17}}, r"none from 0 with interval 17"),
        ({"tenet": {"groups": 9}}, "groups: expected 1 to 8"),
        ({"tenet": {"stage": "fc"}}, r"stage: expected maps \(batch, channels, height, width\), got \(2, 3\)"),
        ({"tenet": {"stage": "pool"}}, "stage: expected maps .* of more than one pixel"),
        ({"training": {"learning_rate": 1e6}}, r"lower training\.learning_rate"),
    ],
)
def test_a_recipe_that_cannot_work_says_so(
    document: dict[str, Any], tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(loop.train(changed(document, **sections), out=tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device: expected one that this machine has, got 'tpu9'"):
        loop.train(recipe, out=tmp_path / "run", device="tpu9")
    with pytest.raises(ValueError, match="got 'meta': it computes nothing"):
        loop.train(recipe, out=tmp_path / "run", device="meta")


def test_one_cycle_rises_to_its_peak_and_falls_to_nothing() -> None:
    shares = [index / 100 for index in range(101)]
    rates = [loop.rate(share, schedule="one-cycle") for share in shares]
    assert rates[0] == pytest.approx(0.04)
    assert rates[30] == pytest.approx(1)
    assert rates[100] == pytest.approx(0)
    assert rates[:31] == sorted(rates[:31])
    assert rates[30:] == sorted(rates[30:], reverse=True)
    assert {loop.rate(share, schedule="constant") for share in shares} == {1.0}
