"""What a runtime says when it fails while it runs -> one line that names the model.

session.run(...) --inside one_line(model)--> RunFailed: "model: the runtime failed: reason; way out"
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Characters of a reason: enough for ONNX Runtime's first line with its node and file, short enough for a log's line.
_LONGEST = 400


class RunFailed(RuntimeError):  # noqa: N818 - what happened, not whose error it was
    """The runtime could not run the model: out of memory, or a graph that does not fit what it was given."""


@contextmanager
def one_line(model: str) -> Iterator[None]:
    """Turn whatever a runtime raises inside the block into one line; ONNX Runtime's own have tracebacks of many.

    Put it around the runtime's call alone: `with one_line(manifest.model): session.run(...)`. Blocks may be nested.

    Args:
        model: the name that the message begins with, or the file's path where it has none yet.

    Raises:
        RunFailed: whatever was raised; the original is its cause.
    """
    try:
        yield
    except RunFailed:
        raise
    except Exception as error:
        raise RunFailed(
            f"{model}: the runtime failed: {reason(error)}; take a smaller batch if memory ran out, else export the "
            "model again"
        ) from error


def reason(error: BaseException) -> str:
    """Return the first line of an error, as one that can be printed: at most 400 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return "".join(letter if letter.isprintable() else "?" for letter in lines[0])[:_LONGEST]
