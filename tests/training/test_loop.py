from __future__ import annotations

import itertools
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from tests.training.runs import changed, run, same, weights
from training import checkpoint, curves, iteration, loop
from training.events import Advanced, EpochEnded, TrainingEnded, TrainingStopped

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from training.recipe import Recipe
    from training.run import Run


def test_training_learns_and_tells_how(recipe: Recipe, tmp_path: Path) -> None:
    epochs, ended = run(recipe, tmp_path / "run")
    assert [event.epoch for event in epochs] == [1, 2, 3, 4]
    assert all(event.epochs == 4 for event in epochs)
    assert [event.done for event in epochs] == [4, 8, 12, 16]
    assert epochs[-1].loss < epochs[0].loss
    assert epochs[-1].correct > 0.8  # chance is a third
    assert ended.test_accuracy > 0.9
    assert ended.iterations == 4 * (36 // 8)
    assert 6 <= ended.tenet_steps == epochs[-1].tenet_steps <= ended.iterations // 2
    assert epochs[ended.best_epoch - 1].validation_accuracy == ended.validation_accuracy
    assert max(event.validation_accuracy for event in epochs) == ended.validation_accuracy


def test_events_are_lines_of_text(tmp_path: Path) -> None:
    epoch = EpochEnded(1, 20, 36, 2.2969, 0.3204, 0.1693, 1 / 3, None, 0.05, 900.0, 0, 1.2)
    robust = EpochEnded(1, 20, 36, 2.2969, None, 0.1693, 1 / 3, 0.125, 0.05, 900.0, 0, 1.2)
    ended = TrainingEnded(tmp_path, 0.98812, 1.0, 20, 44.1, 224, 720, "")
    assert str(epoch) == "loss 2.297, TENET loss 0.320, validation accuracy 33.33%"
    assert str(robust) == "loss 2.297, validation accuracy 33.33%, robust 12.50%"
    assert str(ended) == "test accuracy 98.81% (epoch 20, validation 100.00%), 720 iterations, 224 TENET steps, 44 s"
    assert str(Advanced(3, 40, 100, 1.2345, None, 812.4)) == "epoch 3, loss 1.234, 812 images/s"
    assert str(Advanced(3, 40, 100, 1.2345, 0.25, 812.4)) == "epoch 3, loss 1.234, TENET loss 0.250, 812 images/s"
    stopped = str(TrainingStopped(tmp_path, 3, 40, 100))
    assert stopped == "stopped after 40 of 100 iterations; go on with the same command and --resume"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor, Tensor]]:
    """What each step of a run was taken on: its kind, its images and its labels."""
    taken: list[tuple[str, Tensor, Tensor]] = []
    take = iteration.Iteration._step

    def recorded(self: iteration.Iteration, images: Tensor, labels: Tensor, **how: Any) -> Any:
        taken.append((how["step"], images, labels))
        return take(self, images, labels, **how)

    monkeypatch.setattr(iteration.Iteration, "_step", recorded)
    return taken


@pytest.mark.parametrize(
    ("timing", "expected"),
    [
        ({"start": 0, "interval": 5}, [5, 10, 15]),
        ({"start": 2, "interval": 2}, [2, 4, 6, 8, 10, 12, 14, 16]),
        ({"start": 5, "interval": 3}, [6, 9, 12, 15]),
        ({"start": 5, "interval": 3, "fused": True}, [6, 9, 12, 15]),
    ],
)
def test_tenet_follows_each_interval_th_iteration_from_its_start(
    document: dict[str, Any],
    tmp_path: Path,
    steps: list[tuple[str, Tensor, Tensor]],
    timing: dict[str, int],
    expected: list[int],
) -> None:
    run(changed(document, tenet=timing), tmp_path / "run")
    kinds = [kind for kind, _, _ in steps]
    iterations = [index for index, kind in enumerate(kinds) if kind != "tenet"]
    assert len(iterations) == 16
    if timing.get("fused"):
        assert [number for number, kind in enumerate(kinds, 1) if kind == "fused"] == expected
    else:
        followed = [index - sum(kind == "tenet" for kind in kinds[:index]) for index in range(len(kinds))]
        assert [followed[index] for index, kind in enumerate(kinds) if kind == "tenet"] == expected


def test_a_tenet_step_is_on_the_images_of_the_ordinary_one(
    recipe: Recipe, tmp_path: Path, steps: list[tuple[str, Tensor, Tensor]]
) -> None:
    run(recipe, tmp_path / "run")
    pairs = [(before, step) for before, step in itertools.pairwise(steps) if step[0] == "tenet"]
    assert len(pairs) >= 6
    for (_, images, labels), (_, again, their_labels) in pairs:
        assert torch.equal(images, again)
        assert torch.equal(labels, their_labels)


def test_the_best_epoch_is_picked_on_held_out_images_and_tested_once(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.2, 0.9, 0.5, 0.3, 0.6])
    asked: list[str] = []
    states: list[dict[str, Tensor]] = []

    def accuracy(_work: object, run: Run, part: str) -> float:
        asked.append(part)
        states.append({name: tensor.clone() for name, tensor in run.deployed.state_dict().items()})
        return next(scores)

    monkeypatch.setattr(loop, "_accuracy", accuracy)
    _, ended = run(recipe, tmp_path / "run")
    assert asked == ["validation"] * 4 + ["test"]
    assert (ended.best_epoch, ended.validation_accuracy, ended.test_accuracy) == (2, 0.9, 0.6)
    metrics = checkpoint.load(ended.folder).metrics
    assert (metrics["best_epoch"], metrics["validation_accuracy"], metrics["test_accuracy"]) == (2, 0.9, 0.6)
    assert same(weights(ended.folder), states[1])
    assert same(states[4], states[1])
    assert not same(states[3], states[1])


def test_a_run_is_a_checkpoint_with_its_recipe_and_how_it_went(recipe: Recipe, tmp_path: Path) -> None:
    epochs, ended = run(recipe, tmp_path / "deep" / "run")
    loaded = checkpoint.load(ended.folder)
    assert loaded.recipe == recipe
    assert loaded.class_names == ("blue", "green", "red")
    assert loaded.input_shape == (3, 12, 12)
    assert loaded.metrics["test_accuracy"] == ended.test_accuracy
    assert loaded.metrics["test_images"] == 15
    assert loaded.sha256 == ended.sha256
    assert {name: part.images for name, part in checkpoint.record(ended.folder).data.items()} == {
        "training": 36,
        "validation": 12,
        "test": 15,
    }
    lines = [json.loads(line) for line in (ended.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["validation_accuracy"] for line in lines] == [event.validation_accuracy for event in epochs]
    with Image.open(ended.folder / "curves.png") as picture:
        assert min(picture.size) > 300
    assert [path.name for path in ended.folder.parent.iterdir()] == ["run"]
    assert not (ended.folder / checkpoint.STATE).exists()


def test_a_seed_is_a_run(document: dict[str, Any], tmp_path: Path) -> None:
    torch.rand(3)  # where PyTorch's own random state stands is of no matter
    _, first = run(changed(document), tmp_path / "first")
    torch.rand(5)
    _, again = run(changed(document), tmp_path / "again")
    _, other = run(changed(document, training={"seed": 1}), tmp_path / "other")
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256


def test_few_images_of_each_class_are_a_recorded_choice_of_the_seed(document: dict[str, Any], tmp_path: Path) -> None:
    def trained(name: str, *, seed: int) -> checkpoint.RunRecord:
        few = changed(document, data={"per_class": 6, "validation": 0.34}, training={"seed": seed, "batch_size": 4})
        return checkpoint.record(run(few, tmp_path / name)[1].folder)

    first, again, other = trained("first", seed=0), trained("again", seed=0), trained("other", seed=1)
    assert first.recipe.data.per_class == 6
    assert (first.data["training"].images, first.data["validation"].images) == (12, 6)
    assert first.data == again.data
    assert first.data["training"].sha256 != other.data["training"].sha256


def test_training_leaves_global_state_alone(recipe: Recipe, tmp_path: Path) -> None:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    run(recipe, tmp_path / "run")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_progress_is_told_often(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "ADVANCE_SECONDS", 0.0)
    advanced = [event for event in loop.train(recipe, out=tmp_path / "run") if isinstance(event, Advanced)]
    assert [event.done for event in advanced] == list(range(1, 17))
    assert {event.total for event in advanced} == {16}
    assert all(event.images_per_second > 0 and event.loss > 0 for event in advanced)


@pytest.fixture
def own_colours(colours: Path, tmp_path: Path) -> Path:
    """A copy of the image folder, to change."""
    return shutil.copytree(colours, tmp_path / "colours")


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
def plain(short: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights that the short recipe leads to."""
    _, ended = run(changed(short), tmp_path_factory.mktemp("plain") / "run")
    return weights(ended.folder)


AUGMIX = {"width": 1, "depth": 1}


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("data", {"validation": 0.5}),
        ("data", {"per_class": 12}),
        ("model", {"depth": 14}),
        ("model", {"width": 5}),
        ("model", {"mean": [0.1, 0.5, 0.5]}),
        ("model", {"std": [0.5, 0.5, 0.5]}),
        ("training", {"epochs": 3}),
        ("training", {"batch_size": 12}),
        ("training", {"optimizer": "adamw"}),
        ("training", {"learning_rate": 0.04}),
        ("training", {"weight_decay": 0.1}),
        ("training", {"momentum": 0.0}),
        ("training", {"schedule": "constant"}),
        ("training", {"schedule": "cosine"}),
        ("training", {"schedule": "step", "milestones": [1]}),
        ("training", {"warm_up": 0.5}),
        ("training", {"label_smoothing": 0.1}),
        ("training", {"ema": 0.5}),
        ("training", {"clip_norm": 0.1}),
        ("training", {"precision": "bf16"}),
        ("training", {"seed": 3}),
        ("augmentation", {"crop_padding": 0}),
        ("augmentation", {"flip": True}),
        ("augmentation", {"cutout": 4}),
        ("augmentation", {"random_erasing": 0.5}),
        ("augmentation", {"augmix": AUGMIX}),
        ("augmentation", {"augmix": AUGMIX | {"jsd": 0.0}}),
        ("augmentation", {"augmix": AUGMIX | {"severity": 9.0}}),
        ("augmentation", {"augmix": AUGMIX | {"all_operations": True}}),
        ("adversarial", {"method": "free", "replays": 2}),
        ("adversarial", {"method": "free", "replays": 3, "epsilon": "2/255"}),
        ("adversarial", {"method": "pgd", "steps": 1}),
        ("adversarial", {"method": "pgd", "steps": 1, "random_start": False}),
        ("tenet", {"stage": "layer1"}),
        ("tenet", {"groups": 4}),
        ("tenet", {"variant": "paper"}),
        ("tenet", {"interval": 3}),
        ("tenet", {"start": 6}),
        ("tenet", {"lambda_tenet": 0.2}),
        ("tenet", {"lambda_orth": 0.01}),
        ("tenet", {"exact": True}),
        ("tenet", {"fused": True}),
    ],
    ids=str,
)
def test_every_option_has_an_effect(
    short: dict[str, Any], plain: dict[str, Tensor], tmp_path: Path, section: str, change: dict[str, Any]
) -> None:
    _, ended = run(changed(short, **{section: change}), tmp_path / "run")
    other = weights(ended.folder)
    assert all(bool(tensor.isfinite().all()) for tensor in other.values())
    assert plain.keys() != other.keys() or not all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize("change", [{"channels_last": True}, {"sync_batch_norm": False}], ids=str)
def test_an_option_of_speed_changes_no_result(
    short: dict[str, Any], plain: dict[str, Tensor], tmp_path: Path, change: dict[str, Any]
) -> None:
    _, ended = run(changed(short, training=change), tmp_path / "run")
    assert all(torch.allclose(tensor, plain[name], atol=1e-4) for name, tensor in weights(ended.folder).items())


@pytest.mark.slow
def test_a_compiled_body_learns_the_same(short: dict[str, Any], plain: dict[str, Tensor], tmp_path: Path) -> None:
    _, ended = run(changed(short, training={"compile": True}), tmp_path / "run")
    assert all(torch.allclose(tensor, plain[name], atol=1e-3) for name, tensor in weights(ended.folder).items())


@pytest.mark.parametrize("tenet", [False, True])
@pytest.mark.parametrize("method", ["free", "pgd"])
def test_adversarial_training_is_picked_by_robust_accuracy(
    document: dict[str, Any],
    tmp_path: Path,
    method: str,
    tenet: bool,  # noqa: FBT001
) -> None:
    settings = {"method": method, "epsilon": "4/255"} | ({"replays": 2} if method == "free" else {"steps": 2})
    recipe = changed(document, adversarial=settings, tenet={} if tenet else None)
    epochs, ended = run(recipe, tmp_path / "run")
    robust = [event.robust_accuracy for event in epochs]
    assert all(accuracy is not None and accuracy <= 1 for accuracy in robust)
    assert robust[ended.best_epoch - 1] == max(accuracy for accuracy in robust if accuracy is not None)
    assert ended.iterations == 4 * 4 * (2 if method == "free" else 1)
    assert (ended.tenet_steps > 0) == tenet
    assert ended.test_accuracy > 0.9


def test_an_average_of_a_short_run_forgets_the_first_weights(document: dict[str, Any], tmp_path: Path) -> None:
    _, ended = run(changed(document, training={"ema": 0.999, "epochs": 8}), tmp_path / "run")
    assert ended.test_accuracy > 0.8  # chance is a third


def test_threads_are_those_of_the_recipe(document: dict[str, Any], tmp_path: Path) -> None:
    events = loop.train(changed(document, training={"threads": 2}), out=tmp_path / "run")
    next(events)
    assert torch.get_num_threads() == 2
    del events
    assert torch.get_num_threads() == 1


def test_without_tenet_there_are_no_tenet_steps(document: dict[str, Any], tmp_path: Path) -> None:
    epochs, ended = run(changed(document, tenet=None), tmp_path / "run")
    assert ended.tenet_steps == 0
    assert all(event.tenet_loss is None for event in epochs)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tenet": {"start": 500}}, r"tenet\.start: expected a TENET step in the run's 16 iterations"),
        ({"tenet": {"stage": "layer7"}}, "stage: expected"),
        ({"tenet": {"start": 16, "interval": 3}}, r"none from 16 with interval 3"),
        ({"tenet": {"start": 0, "interval": 17}}, r"none from 0 with interval 17"),
        ({"tenet": {"groups": 9}}, "groups: expected 1 to 8"),
        ({"tenet": {"stage": "fc"}}, r"stage: expected maps \(batch, channels, height, width\), got \(2, 3\)"),
        ({"tenet": {"stage": "pool"}}, "stage: expected maps .* of more than one pixel"),
        ({"training": {"learning_rate": 1e6}}, r"lower training\.learning_rate and begin again \(nothing is kept\)"),
        ({"data": {"per_class": 17}}, r"per_class.* 17"),
    ],
)
def test_a_recipe_that_cannot_work_says_so(
    document: dict[str, Any], tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(loop.train(changed(document, **sections), out=tmp_path / "run"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("factory", "stage", "message"),
    [
        ("apart", "body", r"expected head\(body\(x\)\) to be model\(x\), got logits that differ by up to"),
        ("tied", "0", r"expected parameters of their own, got network\.0\.weight and network\.1\.weight that are one"),
    ],
)
def test_a_model_that_cannot_be_trained_rightly_says_so(
    document: dict[str, Any], tmp_path: Path, factory: str, stage: str, message: str
) -> None:
    document["model"] = {"factory": f"tests.training.classifiers:{factory}"}
    with pytest.raises(ValueError, match=message):
        list(loop.train(changed(document, tenet={"stage": stage}), out=tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device: expected one that this machine has, got 'tpu9'"):
        loop.train(recipe, out=tmp_path / "run", device="tpu9")
    with pytest.raises(ValueError, match="got 'meta': it computes nothing"):
        loop.train(recipe, out=tmp_path / "run", device="meta")


def test_curves_are_drawn_once_when_all_is_known(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, float]] = []
    monkeypatch.setattr(
        curves, "draw", lambda _, *, best_epoch, test_accuracy: drawn.append((best_epoch, test_accuracy))
    )
    _, ended = run(recipe, tmp_path / "run")
    assert drawn == [(ended.best_epoch, ended.test_accuracy)]
