"""What clients may see and do of the repository, whichever dialect they say it in.

RepositoryIndex | Load | Unload, of Triton's, KServe's or MLServer's clients --> here --> models
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.errors import InvalidArgument, Unimplemented

if TYPE_CHECKING:
    from collections.abc import Iterable

    from service.inference.models import Entry, Models

# What Triton's clients may send with a load: another configuration, and other files.
_OVERRIDES = ("config", "file:")


async def index(models: Models, *, ready: bool) -> list[Entry]:
    """Return every version that the repository has now, or only those that answer."""
    await models.refresh()
    return [entry for entry in models.index() if not ready or entry.state == "READY"]


async def load(models: Models, model: str, *, parameters: Iterable[str] = ()) -> None:
    """Load a model, or load it again; return when it answers.

    Raises:
        InvalidArgument: the name or a parameter is none.
        Unimplemented: a parameter would change the model.
        FailedPrecondition: the server does not let clients do this, or the model cannot be served.
        NotFound: the repository has no such model.
        Unavailable: the repository cannot be reached, or the server is shutting down.
    """
    for parameter in parameters:
        if parameter.startswith(_OVERRIDES):
            raise Unimplemented(
                f"parameter {parameter!r}: models are loaded as they were published; publish another version, or set "
                f"[model.{model}] in the server's settings"
            )
        raise InvalidArgument(f"parameter {parameter!r}: expected no parameters; leave it out")
    await models.load(model)


async def unload(models: Models, model: str, *, parameters: Iterable[str] = ()) -> None:
    """Take a model out of service; what it is busy with is finished. An unknown one is no error.

    Raises:
        InvalidArgument: the name or a parameter is none.
        FailedPrecondition: the server does not let clients do this.
        Unavailable: the server is shutting down.
    """
    for parameter in parameters:
        # There are no ensembles, and so no dependents: with or without, the model alone is unloaded.
        if parameter != "unload_dependents":
            raise InvalidArgument(f"parameter {parameter!r}: expected 'unload_dependents'; leave it out")
    await models.unload(model)


def model_named(*, repository_name: str, model_name: str) -> str:
    """Return the model that a load or unload means: Triton's clients name it second, KServe's first.

    Raises:
        InvalidArgument: it names none.
        Unimplemented: it names a model and a repository; there is one, without a name.
    """
    if model_name and repository_name:
        raise Unimplemented(
            f"repository_name {repository_name!r}: expected none; there is one repository, name only the model"
        )
    if not (model_name or repository_name):
        raise InvalidArgument("model_name: expected the name of a model, got none")
    return model_name or repository_name


def check_repository(name: str) -> None:
    """Refuse to list a repository by name: there is one, without a name; raises `Unimplemented`."""
    if name:
        raise Unimplemented(f"repository_name {name!r}: expected none; there is one repository, leave the name out")
