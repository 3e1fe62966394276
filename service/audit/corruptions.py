"""Common corruptions for small images, in the parameter set of CIFAR-10-C.

images (uint8) + name + severity + one seed per image -> check -> table of corruptions -> images (uint8)

The algorithms and their constants follow Hendrycks and Dietterich, "Benchmarking Neural Network Robustness
to Common Corruptions and Perturbations" (ICLR 2019), in the version made for 32 x 32 images, not the stronger
one made for ImageNet. Batches are computed at once, by operations whose rounding does not depend on the
batch, so that an image's result is the same wherever and with whomever it is computed.
"""

import hashlib
import io
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, UInt8
from PIL import Image
from torch.nn.functional import pad

Images = UInt8[np.ndarray, "n h w 3"]
Seeds = Int64[np.ndarray, " n"]

SEVERITIES = range(1, 6)

# The constants of the CIFAR set, severity 1 first.
_NOISE_DEVIATIONS = (0.04, 0.06, 0.08, 0.09, 0.10)  # of the range [0, 1]
_DISKS = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))  # radius, anti-alias sigma; pixels
_FOGS = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))  # thickness in [0, 1], roughness decay
_CONTRASTS = (0.75, 0.5, 0.4, 0.3, 0.15)  # factor on the distance from the mean
_JPEG_QUALITIES = (80, 65, 58, 50, 40)  # of libjpeg's scale, 1 to 100

_DISK_REACH = 2  # pixels; the largest disk reaches 1, its anti-aliasing one more
_SMALLEST_SIDE = _DISK_REACH + 1  # pixels; reflection at the border needs one more than it reflects


def corrupt(images: Images, *, name: str, severity: int, seeds: Seeds) -> Images:
    """Corrupt each image of a batch.

    An image's result depends on the image, the name, the severity and its own seed, and on nothing else: not
    on the batch it came in, nor on its place there. Values are truncated, not rounded, as in the published
    files.

    Args:
        images: uint8 (n, h, w, 3), RGB, n >= 1, h and w >= 3. The constants are made for 32 x 32.
        name: one of `NAMES`.
        severity: 1 (weakest) to 5.
        seeds: int64 (n,), one per image, from `image_seed`.

    Returns:
        uint8 (n, h, w, 3), a new array.

    Raises:
        ValueError: the name or the severity is unknown, or an array is empty or of another type or shape.
    """
    if name not in _CORRUPTIONS:
        raise ValueError(f"expected a corruption among {', '.join(NAMES)}, got {name!r}; choose one of them")
    if severity not in SEVERITIES:
        raise ValueError(f"expected a severity from 1 to 5, got {severity}; choose 1 for the weakest")
    _check_images(images)
    _check_seeds(seeds, n=len(images))
    return _CORRUPTIONS[name](images, severity - 1, seeds)


def image_seed(*, seed: int, index: int, name: str, severity: int) -> int:
    """Derive the seed of one image under one corruption.

    Args:
        seed: the audit's seed.
        index: the image's place in the data set (not in a batch or a shard).
        name: the corruption.
        severity: 1 to 5.

    Returns:
        A number in [0, 2**63), the same in every process, on every machine and for every Python.
    """
    key = f"{seed}/{index}/{name}/{severity}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def _check_images(images: Images) -> None:
    if images.dtype != np.uint8:
        raise ValueError(f"expected images of uint8 in 0 to 255, got {images.dtype}; scale and convert them first")
    if images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"expected images of shape (n, h, w, 3), got {images.shape}; put the channels last")
    if len(images) == 0:
        raise ValueError("expected at least one image, got an empty batch; leave the call out")
    if min(images.shape[1:3]) < _SMALLEST_SIDE:
        height, width = images.shape[1:3]
        raise ValueError(f"expected sides of at least {_SMALLEST_SIDE} pixels, got {height} x {width}; enlarge them")


def _check_seeds(seeds: Seeds, *, n: int) -> None:
    if seeds.dtype != np.int64:
        raise ValueError(f"expected seeds of int64, got {seeds.dtype}; take them from image_seed")
    if seeds.shape != (n,):
        raise ValueError(f"expected seeds of shape ({n},), got {seeds.shape}; give each image its own")


def _unit(images: Images) -> Float64[torch.Tensor, "n h w 3"]:
    return torch.tensor(images, dtype=torch.float64) / 255


def _truncated(unit: Float64[torch.Tensor, "n h w 3"]) -> Images:
    return (unit.clamp(0, 1) * 255).to(torch.uint8).numpy()


def _generators(seeds: Seeds) -> list[np.random.Generator]:
    # NumPy's, because a torch generator on the CPU takes only 32 bits of its seed: images would share noise.
    return [np.random.default_rng(seed) for seed in seeds.astype(np.uint64).tolist()]


def _gaussian_noise(images: Images, level: int, seeds: Seeds) -> Images:
    noise = np.stack([generator.standard_normal(images.shape[1:]) for generator in _generators(seeds)])
    return _truncated(_unit(images) + _NOISE_DEVIATIONS[level] * torch.from_numpy(noise))


def _defocus_blur(images: Images, level: int, _seeds: Seeds) -> Images:
    radius, sigma = _DISKS[level]
    height, width = images.shape[1:3]
    border = (_DISK_REACH,) * 4
    padded = pad(_unit(images).permute(0, 3, 1, 2), border, mode="reflect").permute(0, 2, 3, 1)
    blurred = torch.zeros(images.shape, dtype=torch.float64)
    # Shift and add instead of a convolution, whose order of addition may depend on the batch: in flat areas
    # the last bit decides whether truncation loses a grey level.
    for (row, column), weight in np.ndenumerate(_disk(radius, sigma)):
        blurred += float(weight) * padded[:, row : row + height, column : column + width]
    return _truncated(blurred)


def _disk(radius: float, sigma: float) -> Float32[np.ndarray, "5 5"]:
    """A disk of the given radius (pixels), softened by a Gaussian of three taps; sums to 1 up to float32."""
    offsets = np.arange(-_DISK_REACH, _DISK_REACH + 1)
    inside = (offsets[:, None] ** 2 + offsets[None, :] ** 2 <= radius**2).astype(np.float32)
    taps = np.exp(-(np.arange(-1, 2) ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).astype(np.float32)
    kernel: Float32[np.ndarray, "5 5"] = inside / inside.sum()
    for axis in (1, 0):
        kernel = np.apply_along_axis(np.convolve, axis, kernel, taps, mode="same")
    return kernel


def _fog(images: Images, level: int, seeds: Seeds) -> Images:
    thickness, decay = _FOGS[level]
    height, width = images.shape[1:3]
    unit = _unit(images)
    brightest = unit.amax(dim=(1, 2, 3), keepdim=True)
    haze = _plasma(seeds, size=_power_of_two(max(height, width)), decay=decay)[:, :height, :width, None]
    return _truncated((unit + thickness * haze) * brightest / (brightest + thickness))


def _power_of_two(side: int) -> int:
    return 1 << (side - 1).bit_length()


def _plasma(seeds: Seeds, *, size: int, decay: float) -> Float64[torch.Tensor, "n size size"]:
    """Plasma fractals: the diamond-square algorithm on a torus, stretched to [0, 1] each.

    Each round halves the step: the centres of the squares, then the middles of their sides, become the mean
    of their four neighbours plus a random offset, whose bound shrinks by the decay's square with each round.
    """
    draws = np.stack([generator.uniform(-1, 1, size * size - 1) for generator in _generators(seeds)])
    maps = torch.zeros((len(seeds), size, size), dtype=torch.float64)
    bound = 1.0
    for cells in (2**power for power in range(size.bit_length() - 1)):
        fresh = torch.from_numpy(draws[:, cells**2 - 1 : 4 * cells**2 - 1]).reshape(-1, 3, cells, cells)
        _halve_the_step(maps, offsets=bound * fresh)
        bound /= decay**2
    maps -= maps.amin(dim=(1, 2), keepdim=True)
    return maps / maps.amax(dim=(1, 2), keepdim=True)


def _halve_the_step(
    maps: Float64[torch.Tensor, "n size size"], *, offsets: Float64[torch.Tensor, "n 3 cells cells"]
) -> None:
    step = maps.shape[1] // offsets.shape[2]
    half = step // 2
    corner = maps[:, ::step, ::step].clone()
    below, right = corner.roll(-1, 1), corner.roll(-1, 2)
    centre = (corner + below + right + below.roll(-1, 2)) / 4 + offsets[:, 0]
    maps[:, half::step, half::step] = centre
    maps[:, ::step, half::step] = (centre + centre.roll(1, 1) + corner + right) / 4 + offsets[:, 1]
    maps[:, half::step, ::step] = (centre + centre.roll(1, 2) + corner + below) / 4 + offsets[:, 2]


def _contrast(images: Images, level: int, _seeds: Seeds) -> Images:
    # Whole numbers sum exactly, in any order.
    sums = torch.tensor(images, dtype=torch.int64).sum(dim=(1, 2), keepdim=True)
    means = sums.double() / (images.shape[1] * images.shape[2]) / 255
    return _truncated((_unit(images) - means) * _CONTRASTS[level] + means)


def _jpeg_compression(images: Images, level: int, _seeds: Seeds) -> Images:
    return np.stack([_through_jpeg(image, quality=_JPEG_QUALITIES[level]) for image in images])


def _through_jpeg(image: UInt8[np.ndarray, "h w 3"], *, quality: int) -> UInt8[np.ndarray, "h w 3"]:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    with Image.open(file) as decoded:
        return np.asarray(decoded)


_CORRUPTIONS: dict[str, Callable[[Images, int, Seeds], Images]] = {
    "gaussian_noise": _gaussian_noise,
    "defocus_blur": _defocus_blur,
    "fog": _fog,
    "contrast": _contrast,
    "jpeg_compression": _jpeg_compression,
}

NAMES: tuple[str, ...] = tuple(_CORRUPTIONS)
