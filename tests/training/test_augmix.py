from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from scipy.special import rel_entr, softmax
from torch import Tensor

from training import augmix
from training.recipe import AugMix
from training.stream import Stream

BILINEAR = Image.Resampling.BILINEAR


def seeded(seed: int = 0, *, process: int = 0, processes: int = 1) -> Stream:
    return Stream(torch.Generator().manual_seed(seed), process=process, processes=processes)


def images(count: int = 6, *, height: int = 12, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, height, width, 3), generator=generator, dtype=torch.uint8)
    pixels[1::3] = pixels[1::3] // 3 + 60  # of low contrast
    pixels[2::3, :, :, 1] = 77  # with a flat channel
    return pixels


# The published operations (google-research/augmix, augmentations.py) at a level that is drawn already.


def whole(level: float, greatest: float) -> int:
    return int(level * greatest / 10)


def part(level: float, greatest: float) -> float:
    return level * greatest / 10


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=BILINEAR)


PILLOW: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "autocontrast": lambda image, _level, _sign: ImageOps.autocontrast(image),
    "equalize": lambda image, _level, _sign: ImageOps.equalize(image),
    "posterize": lambda image, level, _sign: ImageOps.posterize(image, 4 - whole(level, 4)),
    "rotate": lambda image, level, sign: image.rotate(sign * whole(level, 30), resample=BILINEAR),
    "solarize": lambda image, level, _sign: ImageOps.solarize(image, 256 - whole(level, 256)),
    "shear_x": lambda image, level, sign: affine(image, 1, sign * part(level, 0.3), 0, 0, 1, 0),
    "shear_y": lambda image, level, sign: affine(image, 1, 0, 0, sign * part(level, 0.3), 1, 0),
    "translate_x": lambda image, level, sign: affine(image, 1, 0, sign * whole(level, image.width / 3), 0, 1, 0),
    "translate_y": lambda image, level, sign: affine(image, 1, 0, 0, 0, 1, sign * whole(level, image.height / 3)),
    "color": lambda image, level, _sign: ImageEnhance.Color(image).enhance(part(level, 1.8) + 0.1),
    "contrast": lambda image, level, _sign: ImageEnhance.Contrast(image).enhance(part(level, 1.8) + 0.1),
    "brightness": lambda image, level, _sign: ImageEnhance.Brightness(image).enhance(part(level, 1.8) + 0.1),
    "sharpness": lambda image, level, _sign: ImageEnhance.Sharpness(image).enhance(part(level, 1.8) + 0.1),
}


def operate(pixels: Tensor, names: tuple[str, ...], choices: list[int], levels: Tensor, signs: Tensor) -> Tensor:
    planes = pixels.permute(0, 3, 1, 2).contiguous()
    return augmix._operate(planes, names, torch.tensor(choices), levels=levels, signs=signs).permute(0, 2, 3, 1)


def by_pillow(name: str, pixels: Tensor, *, level: float, sign: int) -> Tensor:
    return torch.from_numpy(np.array(PILLOW[name](Image.fromarray(pixels.numpy()), level, sign)))


def test_the_operations_are_the_published_ones() -> None:
    assert list(PILLOW) == [*augmix.PUBLISHED, *augmix.OVERLAPPING]


@pytest.mark.parametrize("size", [(20, 20), (16, 25)], ids=["square", "wide"])
@pytest.mark.parametrize("name", PILLOW)
def test_an_operation_is_pillows_within_a_grey_level(name: str, size: tuple[int, int]) -> None:
    height, width = size
    pixels = images(count=12, height=height, width=width)
    levels, signs = torch.linspace(0.13, 9.97, 12), torch.tensor([1.0, -1.0]).repeat(6)
    ours = operate(pixels, (name,), [0] * 12, levels, signs)
    for image, before, level, sign in zip(ours, pixels, levels.tolist(), signs.tolist(), strict=True):
        theirs = by_pillow(name, before, level=level, sign=int(sign))
        differences = (image.int() - theirs.int()).abs()
        assert differences.max() <= 1
        assert (differences > 0).float().mean() < 0.05


@pytest.mark.parametrize("name", PILLOW)
def test_an_operation_takes_images_without_any_variation(name: str) -> None:
    pixels = torch.tensor([0, 100, 255], dtype=torch.uint8)[:, None, None, None].expand(3, 9, 9, 3).contiguous()
    ours = operate(pixels, (name,), [0] * 3, torch.tensor([2.0, 5.0, 9.0]), torch.ones(3))
    for image, before, level in zip(ours, pixels, (2.0, 5.0, 9.0), strict=True):
        assert (image.int() - by_pillow(name, before, level=level, sign=1).int()).abs().max() <= 1


def test_images_undergo_the_operations_that_they_chose_and_no_other() -> None:
    names = tuple(PILLOW)
    pixels = images(count=15)
    choices = [*range(13), 13, 13]  # 13 is no operation's number
    levels, signs = torch.full((15,), 5.0), torch.ones(15)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    together = operate(pixels[order], names, [choices[index] for index in order], levels, signs)
    for image, index in zip(together, order.tolist(), strict=True):
        alone = operate(pixels[index : index + 1], names, [choices[index]], levels[:1], signs[:1])
        assert torch.equal(image, alone[0])
    assert torch.equal(together[order.argsort()][13:], pixels[13:])


def test_the_input_stays_what_it_was() -> None:
    pixels = images()
    augmix.mix(pixels, AugMix(), stream=seeded())
    assert torch.equal(pixels, images())


@given(
    severity=st.floats(0.01, 10),
    width=st.integers(1, 5),
    depth=st.sampled_from([-1, 1, 2, 3, 4]),
    alpha=st.floats(0.05, 20),
    all_operations=st.booleans(),
    seed=st.integers(0, 100),
)
def test_mixed_images_are_of_unit_range(**settings: object) -> None:
    seed = settings.pop("seed")
    assert isinstance(seed, int)
    mixed = augmix.mix(images(count=3), AugMix.model_validate(settings), stream=seeded(seed))
    assert mixed.shape == (3, 3, 12, 12)
    assert mixed.dtype == torch.float32
    assert 0 <= mixed.min() <= mixed.max() <= 1


def test_a_mixed_image_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = images(count=4)
    settings = AugMix(width=3, depth=2, alpha=0.7)
    kept = []
    chains = augmix._chains

    def spied(*args: object, **kwargs: object) -> Tensor:
        kept.append(chains(*args, **kwargs))  # type: ignore[arg-type]
        return kept[-1]

    monkeypatch.setattr(augmix, "_chains", spied)
    mixed = augmix.mix(pixels, settings, stream=seeded())
    stream = seeded()
    weights, share = stream.dirichlet(0.7, 4, 3), stream.beta(0.7, 4)
    for index, image in enumerate(pixels.permute(0, 3, 1, 2)):
        mixture = sum(weights[index, chain] * kept[0][3 * index + chain].double() for chain in range(3))
        expected = (1 - share[index]) * image + share[index] * mixture
        assert torch.allclose(mixed[index].double(), expected / 255, rtol=0, atol=1e-6)


def test_a_random_depth_is_1_to_3(monkeypatch: pytest.MonkeyPatch) -> None:
    operations: list[Tensor] = []

    def counted(planes: Tensor, names: tuple[str, ...], choices: Tensor, **_rest: object) -> Tensor:
        operations.append(choices < len(names))
        return planes

    monkeypatch.setattr(augmix, "_operate", counted)
    augmix.mix(images(count=100), AugMix(depth=-1), stream=seeded())
    counts = torch.bincount(torch.stack(operations).sum(0), minlength=4)
    assert counts[0] == 0
    assert 70 < counts[1:].min() <= counts[1:].max() < 130
    operations.clear()
    augmix.mix(images(count=4), AugMix(depth=4), stream=seeded())
    assert torch.stack(operations).sum(0).tolist() == [4] * 12


def test_levels_are_up_to_the_severity(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Tensor, Tensor]] = []

    def noted(planes: Tensor, *_rest: object, levels: Tensor, signs: Tensor) -> Tensor:
        drawn.append((levels, signs))
        return planes

    monkeypatch.setattr(augmix, "_operate", noted)
    augmix.mix(images(count=200), AugMix(severity=4), stream=seeded())
    levels, signs = (torch.cat(column) for column in zip(*drawn, strict=True))
    assert 0.1 <= levels.min() < 0.15
    assert 3.95 < levels.max() < 4
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.1


def test_overlapping_operations_come_on_request_alone() -> None:
    pixels = images(count=64)
    few = augmix.mix(pixels, AugMix(), stream=seeded())
    many = augmix.mix(pixels, AugMix(all_operations=True), stream=seeded())
    assert not torch.equal(few, many)


@pytest.mark.parametrize("depth", [-1, 2])
def test_two_processes_mix_their_halves_like_one_the_whole(depth: int) -> None:
    settings = AugMix.model_validate({"depth": depth, "all_operations": True})
    pixels = images(count=16)
    whole_batch = augmix.mix(pixels, settings, stream=seeded())
    halves = [augmix.mix(pixels[8 * p : 8 * p + 8], settings, stream=seeded(process=p, processes=2)) for p in range(2)]
    assert torch.equal(torch.cat(halves), whole_batch)


def logits(seed: int = 0, *, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


@given(seed=st.integers(0, 100), scale=st.floats(0.01, 50))
def test_jensen_shannon_by_hand(seed: int, scale: float) -> None:
    views = logits(seed, scale=scale)
    probabilities = [softmax(view.numpy(), axis=1) for view in views]
    mixture = np.clip(np.mean(probabilities, 0), 1e-7, 1)
    expected = np.mean([rel_entr(p, mixture).sum(1).mean() for p in probabilities])
    assert math.isclose(float(augmix.jensen_shannon(views)), expected, rel_tol=1e-9, abs_tol=1e-12)


def test_jensen_shannon_is_that_of_the_published_code() -> None:
    views = logits(scale=3)
    clean, first, second = (view.softmax(1) for view in views)
    mixture = ((clean + first + second) / 3).clamp(1e-7, 1).log()
    divergences = [torch.nn.functional.kl_div(mixture, p, reduction="batchmean") for p in (clean, first, second)]
    assert torch.isclose(augmix.jensen_shannon(views), sum(divergences, torch.tensor(0.0)) / 3)


def test_jensen_shannon_of_equal_views_is_0_and_of_certain_contrary_ones_the_most() -> None:
    view = logits()[0]
    assert abs(float(augmix.jensen_shannon([view] * 3))) < 1e-12
    contrary = list(1000 * torch.eye(3, dtype=torch.float64)[:, None])
    assert math.isclose(float(augmix.jensen_shannon(contrary)), math.log(3))


def test_jensen_shannon_is_symmetric() -> None:
    first, second, third = logits()
    expected = augmix.jensen_shannon([first, second, third])
    assert torch.isclose(augmix.jensen_shannon([third, first, second]), expected)
    assert torch.isclose(augmix.jensen_shannon([second, first, third]), expected)


def test_jensen_shannon_is_differentiated_correctly() -> None:
    views = [view.requires_grad_() for view in logits()]
    assert torch.autograd.gradcheck(lambda *leaves: augmix.jensen_shannon(leaves), views)


def test_certain_predictions_have_finite_gradients() -> None:
    views = [torch.tensor([[sign * 500.0, 0.0, 7.0]]).requires_grad_() for sign in (1, -1, 1)]
    for gradient in torch.autograd.grad(augmix.jensen_shannon(views), views):
        assert bool(gradient.isfinite().all())


def test_jensen_shannon_of_half_precision_is_computed_in_single() -> None:
    views = [view.bfloat16() for view in logits()]
    divergence = augmix.jensen_shannon(views)
    assert divergence.dtype == torch.float32
    assert torch.equal(divergence, augmix.jensen_shannon([view.float() for view in views]))
