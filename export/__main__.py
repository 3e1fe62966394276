"""`python -m export`: what `tenet export` does, for scripts that need no service code."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from export import publish
from export.manifest import Precision, Runtime, checked_name
from export.repository import Repository, Version


def main() -> int:
    """Publish a run, or a variant of what is in the repository; print the version's folder."""
    parser = argparse.ArgumentParser(prog="python -m export", description=main.__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="a RUN folder of `python -m training`")
    parser.add_argument("--repository", type=Path, required=True, help="the model repository; made if missing")
    parser.add_argument("--name", required=True, help="the model's name in the repository")
    parser.add_argument("--from", dest="source", metavar="NAME[@VERSION]", help="make a variant of what is there")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32")
    parser.add_argument("--runtime", choices=get_args(Runtime), default="onnxruntime")
    parser.add_argument("--images", type=Path, help="folder of class folders for calibration and parity")
    arguments = parser.parse_args()
    if (arguments.run is None) == (arguments.source is None):
        parser.error("expected either a RUN folder or --from NAME; give one of them")
    try:
        print(_publish(arguments).folder)  # noqa: T201 - this is the command's output
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _publish(arguments: argparse.Namespace) -> Version:
    repository = Repository(arguments.repository)
    name = checked_name(arguments.name)
    if arguments.run is not None:
        return publish.publish_checkpoint(arguments.run, repository=repository, name=name, images=arguments.images)
    return publish.publish_variant(
        repository.parse(arguments.source),
        repository=repository,
        name=name,
        kind=arguments.precision,
        runtime=arguments.runtime,
        images=arguments.images,
    )


if __name__ == "__main__":
    sys.exit(main())
