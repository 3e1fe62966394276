"""What `tensorrt` measured in earlier builds on this GPU: with it, the next build takes a fraction of the time.

folder/<runtime, version, GPU, driver>.timings --> builder --> the same file, whole or not at all
"""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from export.engines import cuda
from export.store import atomic

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_log = logging.getLogger(__name__)


@contextmanager
def kept(config: Any, folder: Path | None, *, runtime: str, version: str) -> Iterator[None]:
    """Start from what was measured by this version on this GPU, and keep what is measured now.

    A folder that cannot be read or written costs time and nothing else: that is logged.
    """
    if folder is None:
        yield
        return
    gpu = cuda.current_gpu()
    parts = runtime, version, *((gpu.name, gpu.compute_capability) if gpu else ()), cuda.driver_version() or ""
    path = folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', '_'.join(parts))}.timings"
    cache = config.create_timing_cache(_read(path))
    # TensorRT refuses what another GPU or version measured, and begins again: False says that it must not mind.
    if not cache or not config.set_timing_cache(cache, False):  # noqa: FBT003 - TensorRT's own signature
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)  # noqa: FBT003 - as above
    yield
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write(path, bytes(config.get_timing_cache().serialize()))
    except OSError as error:
        _log.warning("the timings of this build could not be kept: %s", error)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.is_file() else b""
    except OSError as error:
        _log.warning("the timings of earlier builds cannot be read, all is measured again: %s", error)
        return b""
