"""The log of a TensorRT build: everything that it says, written beside the plan, without folders of this machine.

TensorRT --messages--> build.log, whether the build succeeds, fails or is stopped
"""

from __future__ import annotations

import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.engines.messages import heard, interruptible
from export.store import atomic

if TYPE_CHECKING:
    from collections.abc import Iterator

    from export.engines.messages import Messages


@contextmanager
def kept(trt: Any, log: Path, *, private: tuple[Path, ...]) -> Iterator[Messages]:
    """Collect what TensorRT says, and write it down even if the build fails; without folders of this machine."""
    with heard(trt) as messages, interruptible(messages):
        try:
            yield messages
        finally:
            lines = (f"[{message.severity}] {message.text}\n" for message in messages.all)
            atomic.write(log, _without(private, "".join(lines)).encode())


def _without(private: tuple[Path, ...], text: str) -> str:
    folders = {*private, Path.cwd(), Path.home(), Path(tempfile.gettempdir()), Path(sys.prefix)}
    names = {str(folder) for path in folders for folder in (path.absolute(), path.resolve())} - {"/"}
    # The longest first: one may lie below another.
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(re.escape(name) + r"(?=/|\b)/?", "", text)
    return text
