"""Where rebuilt plans are kept: each under a name that says what it was made of, whole or not at all.

name --lock--> there and undamaged? --no--> an unfinished folder --make, verify, flush, rename--> cache/<name>
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from export import manifest as manifests
from export.store import atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_log = logging.getLogger(__name__)

# Names that begin like this are unfinished: of a process at work, or of one that was killed.
_UNFINISHED = ".unfinished-"


def kept(cache: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder `name` of a cache, whole; made first if it is not there, by one process at a time.

    Args:
        cache: the folder of them all, made if it is not there.
        name: says what is in the folder, once and for all.
        make: fills an empty folder with a version: manifest, engine and files. What it raises goes on to the caller,
            and nothing is kept.
    """
    cache.mkdir(parents=True, exist_ok=True)
    place = cache / name
    with _alone(cache / f"{name}.lock"):
        if _whole(place):
            return place
        _swept(cache, name)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED}{name[:16]}-", dir=cache))
        try:
            make(unfinished)
            manifests.verify_all(unfinished)
            unfinished.chmod(0o755)
            atomic.flush_tree(unfinished)
            unfinished.rename(place)
            atomic.flush(cache)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return place


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock that the kernel releases, even if this process is killed; threads wait for each other, too."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _whole(place: Path) -> bool:
    """Return whether a kept version is as it was when it was kept; a damaged one is logged."""
    if not place.exists():
        return False
    try:
        manifests.verify_all(place)
    except (OSError, ValueError) as error:
        _log.warning("a plan that was kept is damaged and will be built again: %s", error)
        return False
    return True


def _swept(cache: Path, name: str) -> None:
    """Remove a damaged version, and what processes left that were killed while they made it."""
    for path in (cache / name, *cache.glob(f"{_UNFINISHED}{name[:16]}-*")):
        if path.exists():
            shutil.rmtree(path)
