from __future__ import annotations

import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from export import twin
from training import checkpoint

_MODULE = """
import torch
from torch import nn


def net(num_classes):
    body = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(4, num_classes))


def fixed():
    return net(3)


def picky(num_classes, depth):
    return net(num_classes)


def broken(num_classes):
    raise OSError("no weights here")


def number(num_classes):
    return num_classes
"""


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of somebody's own, which can be imported."""
    name = f"own_networks_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def _network(factory: str, **more: object) -> twin.Network:
    return twin.Network.model_validate(
        {"factory": factory, "input_shape": (3, 8, 8), "class_names": ("a", "b", "c"), **more}
    )


def _trained(module: str) -> nn.Module:
    network: nn.Module = sys.modules[module].net(3)
    for index, parameter in enumerate(network.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    return network.eval()


@pytest.fixture
def trained(networks: str) -> nn.Module:
    __import__(networks)
    return _trained(networks)


def _save(kind: str, state: dict[str, torch.Tensor], folder: Path) -> Path:
    path = folder / f"weights.{kind}"
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    elif kind == "pth":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pth"])
@pytest.mark.parametrize("factory", ["net", "fixed"])
def test_weights_of_every_kind_give_the_network_s_own_answers(
    networks: str, trained: nn.Module, tmp_path: Path, kind: str, factory: str
) -> None:
    weights = _save(kind, trained.state_dict(), tmp_path)
    network = _network(f"{networks}:{factory}", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    written = twin.write(tmp_path / "twin", network, weights)
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    scaled = (images - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    expected = trained(scaled)
    torch.testing.assert_close(written(images), expected)
    again = twin.read(tmp_path / "twin")
    assert not again.training
    torch.testing.assert_close(again(images), expected)


def test_a_run_s_folder_is_read_as_its_checkpoint(digits_run: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(twin.read(digits_run)(images), checkpoint.load(digits_run).model(images))


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("picky", "expected a function of num_classes alone, or of nothing"),
        ("broken", "failed: OSError: no weights here"),
        ("number", "expected a function that returns a torch.nn.Module, got int"),
        ("nowhere", "expected a function that can be imported"),
    ],
)
def test_a_factory_that_gives_no_network_is_refused(
    networks: str, trained: nn.Module, tmp_path: Path, factory: str, complaint: str
) -> None:
    weights = _save("pt", trained.state_dict(), tmp_path)
    with pytest.raises(ValueError, match=complaint):
        twin.write(tmp_path / "twin", _network(f"{networks}:{factory}"), weights)
    assert not (tmp_path / "twin").exists()


def test_weights_of_another_network_are_refused_with_their_names(
    networks: str, trained: nn.Module, tmp_path: Path
) -> None:
    network, state = _network(f"{networks}:net"), trained.state_dict()
    few = {name: value for name, value in state.items() if not name.startswith("1.")}
    wide = state | {"4.weight": torch.zeros(7, 4)}
    for changed, complaint in [
        (few, r"1\.bias, 1\.num_batches_tracked, 1\.running_mean and 2 more missing"),
        (state | {"head": torch.zeros(1)}, "got head; name the right factory"),
        (wide, r"4\.weight: expected shape \(3, 4\), got \(7, 4\)"),
        (state | {"4.bias": torch.full((3,), torch.nan)}, r"got NaN or infinity in 4\.bias"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            twin.write(tmp_path / "twin", network, _save("pt", changed, tmp_path))


def test_files_that_are_no_weights_are_refused(networks: str, trained: nn.Module, tmp_path: Path) -> None:
    network = _network(f"{networks}:net")
    whole = tmp_path / "whole.pt"
    torch.save(trained, whole)
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("whole.pt", "text.pt", "text.safetensors", "list.pt"):
        with pytest.raises(ValueError, match=rf"{name}: expected a (plain )?state_dict"):
            twin.write(tmp_path / "twin", network, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such file"):
        twin.write(tmp_path / "twin", network, tmp_path / "none.pt")


def test_normalisation_has_a_number_for_each_channel(networks: str, trained: nn.Module, tmp_path: Path) -> None:
    weights = _save("pt", trained.state_dict(), tmp_path)
    with pytest.raises(ValueError, match="expected 3 numbers each, one a channel, got 2 and 3"):
        twin.write(tmp_path / "twin", _network(f"{networks}:net", mean=(0.5, 0.4)), weights)
    with pytest.raises(ValueError, match="expected numbers above 0"):
        _network(f"{networks}:net", std=(0.0, 1.0, 1.0))
