from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from training import batches, data, recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU = torch.device("cpu")
SIZE = 16  # pixels

# PyTorch warns of more workers than cores, which a test may have
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def numbered(count: int) -> data.LabelledImages:
    """Images that show their number, and have it for a label."""
    numbers = np.arange(count)
    pixels = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (count, 2, 3, 3))
    return data.LabelledImages(np.ascontiguousarray(pixels), numbers.astype(np.int64), tuple(map(str, numbers)))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> data.ImageFiles:
    """Twelve images of noise, of many sizes and two classes."""
    root: Path = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for index in range(12):
        path = root / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20 + index, 40 - index, 3), dtype=np.uint8)).save(path)
    return data.from_folder(root)


def in_files(images: data.ImageFiles, *, workers: int = 0, smallest_crop: float = 0.08) -> batches.Source:
    settings = recipe.Data(name="folder", size=SIZE, workers=workers)
    return batches.source(images, settings=settings, smallest_crop=smallest_crop, device=CPU)


def in_memory(images: data.LabelledImages, *, device: torch.device = CPU) -> batches.Source:
    return batches.source(images, settings=recipe.Data(name="digits"), smallest_crop=1.0, device=device)


def joined(parts: batches.Batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


@given(count=st.integers(1, 60), batch_size=st.integers(2, 16), seed=st.integers(0, 2**60), epoch=st.integers(0, 9))
def test_an_epoch_is_of_whole_batches_and_shows_each_image_at_most_once(
    count: int, batch_size: int, seed: int, epoch: int
) -> None:
    order = batches.order(count, batch_size=batch_size, seed=seed, epoch=epoch)
    assert len(set(order.tolist())) == len(order)
    assert set(order.tolist()) <= set(range(count))
    steps = batches.steps(count, batch_size=batch_size)
    assert len(order) == (steps * batch_size if count >= batch_size else count)
    assert count - len(order) < batch_size
    assert len(torch.split(order, batch_size)) == steps
    assert torch.equal(order, batches.order(count, batch_size=batch_size, seed=seed, epoch=epoch))


def test_each_epoch_and_seed_has_an_order_of_its_own() -> None:
    orders = [
        tuple(batches.order(50, batch_size=10, seed=seed, epoch=epoch).tolist())
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 9


@given(processes=st.integers(1, 4), share=st.integers(2, 8), more=st.integers(0, 60), begun=st.integers(0, 9))
def test_processes_share_each_batch_equally(processes: int, share: int, more: int, begun: int) -> None:
    count, batch_size = processes + more, share * processes
    order = batches.order(count, batch_size=batch_size, seed=0, epoch=0)
    left = order[begun % batches.steps(count, batch_size=batch_size) * batch_size :]
    parts = [batches.own(left, batch_size, number, processes) for number in range(processes)]
    assert len({len(part) for part in parts}) == 1
    batched = zip(*(torch.split(part, share) for part in parts), strict=True)
    shown = torch.cat([torch.cat(batch) for batch in batched])
    assert torch.equal(shown, left if count >= batch_size else left[: count // processes * processes])


def test_a_process_without_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match="data: expected an image for each of the 4 processes, got 3; start fewer"):
        batches.own(torch.arange(3), 8, 0, 4)
    assert len(batches.own(torch.arange(0), 8, 0, 4)) == 0


def test_images_in_memory_come_as_they_are_in_the_order_asked_for() -> None:
    source = in_memory(numbered(20))
    assert (len(source), source.input_shape, source.class_names) == (20, (3, 2, 3), tuple(map(str, range(20))))
    assert source.fingerprint() == numbered(20).fingerprint()
    order = torch.tensor([3, 19, 0, 7, 4])
    for parts in (
        list(source.training(order, batch_size=2, seed=0, epoch=0)),
        list(source.evaluation(order, batch_size=2)),
    ):
        assert [len(labels) for _, labels in parts] == [2, 2, 1]
        images, labels = joined(iter(parts))
        assert images.dtype == torch.uint8
        assert images.shape == (5, 2, 3, 3)
        assert torch.equal(labels, order)
        assert torch.equal(images[:, 1, 2, 2].long(), order)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_images_are_no_batches(photographs: data.ImageFiles, workers: int) -> None:
    for source in (in_memory(numbered(3)), in_files(photographs, workers=workers)):
        assert list(source.evaluation(torch.arange(0), batch_size=2)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_of_files_is_of_what_reading_them_gives(photographs: data.ImageFiles, workers: int) -> None:
    source = in_files(photographs, workers=workers)
    assert (len(source), source.input_shape, source.class_names) == (12, (3, SIZE, SIZE), ("a", "b"))
    assert source.fingerprint() == photographs.fingerprint()
    images, labels = joined(source.evaluation(torch.arange(12).flip(0), batch_size=5))
    read = photographs.read(SIZE)
    np.testing.assert_array_equal(images.flip(0).numpy(), read.images)
    np.testing.assert_array_equal(labels.flip(0).numpy(), read.labels)


def test_random_crops_belong_to_seed_epoch_and_image(photographs: data.ImageFiles) -> None:
    """So they are the same for any number of workers or processes, and wherever a run was interrupted."""

    def crops(
        order: torch.Tensor, *, workers: int = 0, batch_size: int = 4, seed: int = 1, epoch: int = 2
    ) -> torch.Tensor:
        source = in_files(photographs, workers=workers)
        images, labels = joined(source.training(order, batch_size=batch_size, seed=seed, epoch=epoch))
        assert images.shape == (len(order), SIZE, SIZE, 3)
        assert images.dtype == torch.uint8
        assert labels.tolist() == photographs.labels[order.numpy()].tolist()
        return images

    order = batches.order(12, batch_size=4, seed=1, epoch=2)
    whole = crops(order)
    for workers in (1, 2):
        assert torch.equal(crops(order, workers=workers), whole)
    assert torch.equal(crops(order[4:]), whole[4:])
    for number in range(2):
        own = crops(batches.own(order, 4, number, 2), batch_size=2)
        assert torch.equal(own, whole.view(3, 2, 2, SIZE, SIZE, 3)[:, number].flatten(0, 1))
    for other in (crops(order, seed=0), crops(order, epoch=3)):
        assert not any(torch.equal(one, another) for one, another in zip(other, whole, strict=True))


@pytest.mark.parametrize("smallest_crop", [0.5, 1.0])
def test_random_crops_keep_at_least_the_share_that_was_asked_for(tmp_path: Path, smallest_crop: float) -> None:
    """Two ramps tell, of each pixel, where it was; what is kept is a little more than between the outermost ones."""
    down, across = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    (tmp_path / "a").mkdir()
    Image.fromarray(np.stack([down, across, down], axis=-1).astype(np.uint8)).save(tmp_path / "a" / "1.png")
    source = in_files(data.from_folder(tmp_path), smallest_crop=smallest_crop)
    shares = []
    for epoch in range(20):
        ((images, _),) = source.training(torch.arange(1), batch_size=1, seed=0, epoch=epoch)
        span = (images[0, -1, -1].int() - images[0, 0, 0].int())[:2]
        shares.append(float(torch.prod(span / 255 * SIZE / (SIZE - 1))))
    assert smallest_crop - 0.05 < min(shares) < smallest_crop + 0.3
    assert max(shares) < 1.05


@pytest.mark.parametrize("workers", [0, 2])
def test_pytorch_s_own_random_state_is_left_alone(photographs: data.ImageFiles, workers: int) -> None:
    state = torch.random.get_rng_state()
    source = in_files(photographs, workers=workers)
    list(source.training(torch.arange(12), batch_size=4, seed=0, epoch=0))
    list(source.evaluation(torch.arange(12), batch_size=4))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (
            lambda path: path.write_text("no image"),
            ValueError,
            r"3\.png: expected a PNG or JPEG image, got a file that",
        ),
        (lambda path: path.unlink(), FileNotFoundError, r"3\.png"),
    ],
)
def test_a_file_that_cannot_be_decoded_is_one_line_from_a_worker_too(
    tmp_path: Path, workers: int, spoil: Callable[[Path], object], kind: type[Exception], message: str
) -> None:
    (tmp_path / "a").mkdir()
    for index in range(6):
        Image.new("RGB", (20, 20)).save(tmp_path / "a" / f"{index}.png")
    source = in_files(data.from_folder(tmp_path), workers=workers)
    spoil(tmp_path / "a" / "3.png")
    for parts in (
        source.evaluation(torch.arange(6), batch_size=2),
        source.training(torch.arange(6), batch_size=2, seed=0, epoch=0),
    ):
        next(parts)
        with pytest.raises(kind, match=message) as got:
            list(parts)
        assert "\n" not in str(got.value)


def test_batches_that_are_not_asked_for_any_more_do_no_harm(photographs: data.ImageFiles) -> None:
    source = in_files(photographs, workers=2)
    first, _ = next(source.evaluation(torch.arange(12), batch_size=2))
    again, _ = next(source.evaluation(torch.arange(12), batch_size=2))
    assert torch.equal(first, again)


@pytest.mark.gpu
def test_batches_come_out_on_the_gpu(photographs: data.ImageFiles) -> None:
    cuda = torch.device("cuda")
    settings = recipe.Data(name="folder", size=SIZE, workers=2)
    sources = [
        in_memory(photographs.read(SIZE), device=cuda),
        batches.source(photographs, settings=settings, smallest_crop=1.0, device=cuda),
    ]
    for source in sources:
        images, labels = joined(source.evaluation(torch.arange(12), batch_size=5))
        assert images.device.type == labels.device.type == "cuda"
        np.testing.assert_array_equal(images.cpu().numpy(), photographs.read(SIZE).images)
