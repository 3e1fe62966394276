"""Where an engine runs: a device by its name, and the execution provider that runs an ONNX file there.

device "cpu" | "cuda" | "cuda:N", provider --placed--> Place
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# The execution providers, by ONNX Runtime's names.
NAMES: dict[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nv_tensorrt_rtx": "NvTensorRTRTXExecutionProvider",
}

DEVICE_PATTERN = r"cpu|cuda(:(0|[1-9][0-9]{0,3}))?"


@dataclass(frozen=True)
class Place:
    """Where an ONNX file runs: a provider, and on which of the GPUs; 0 on the CPU."""

    provider: str
    ordinal: int = 0


def ordinal_of(device: str) -> int | None:
    """Return which GPU a device names, None for the CPU.

    Raises:
        ValueError: it is no device.
    """
    if not re.fullmatch(DEVICE_PATTERN, device):
        raise ValueError(f"device {device!r}: expected one of cpu, cuda, cuda:N (N counts the GPUs from 0)")
    return None if device == "cpu" else int(device.partition(":")[2] or 0)


def checked_provider(provider: str) -> str:
    """Return a provider's name if there is such a provider; raises ValueError otherwise."""
    if provider not in NAMES:
        raise ValueError(f"provider {provider!r}: expected one of {', '.join(NAMES)}")
    return provider


def placed(*, device: str | None, provider: str | None) -> Place:
    """Return where to run, from what was said of it: each of the two is the other's default, the CPU that of both.

    Raises:
        ValueError: one of them does not exist, or they contradict each other.
    """
    if device is None:
        return Place(checked_provider(provider or "cpu"))
    ordinal = ordinal_of(device)
    if provider is None:
        return Place("cpu") if ordinal is None else Place("cuda", ordinal)
    if (checked_provider(provider) == "cpu") != (ordinal is None):
        fitting = "cpu" if provider == "cpu" else "cuda"
        raise ValueError(f"provider {provider!r}: expected device {fitting!r}, got {device!r}; change one of them")
    return Place(provider, ordinal or 0)
