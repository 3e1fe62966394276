"""From a plan's `[target]` to what is attacked.

target.endpoint --> EndpointTarget      target.model in the repository --> EngineTarget
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.audit.target.endpoint import EndpointTarget
from service.audit.target.engine import EngineTarget

if TYPE_CHECKING:
    from export.repository import Repository
    from service.audit import plan
    from service.audit.target.base import Target
    from service.client import Tls
    from service.client.connection import Token
    from service.settings import Settings


def open_target(
    target: plan.Target,
    *,
    repository: Repository | None,
    device: str | None = None,
    threads: int | None = None,
    settings: Settings | None = None,
    tls: Tls | None = None,
    token: Token | None = None,
) -> Target:
    """Open what a plan attacks; nothing is asked of the model yet.

    Args:
        target: the plan's table.
        repository: where models are; needed for a target without an endpoint.
        device: of an engine: "cpu", "cuda" or "cuda:N"; by default where it belongs.
        threads: of an engine; by default as many as a server gives it.
        settings: those of the server whose engine it is; its defaults if None.
        tls: certificates for an endpoint.
        token: for an endpoint.

    Raises:
        ConnectionError: nobody answers at the endpoint.
        FileNotFoundError: there is no such model in the repository.
        ValueError: the engine is damaged, the endpoint's model is unknown or no classifier of images, or the plan's
            input, labels or mapping do not fit it.
        RuntimeError: this machine cannot run the engine.
    """
    if target.endpoint is not None:
        return EndpointTarget(
            target.endpoint,
            model=target.model,
            version=target.version,
            labels=target.labels,
            mapping=target.mapping,
            wanted=target.input,
            tls=tls,
            token=token,
        )
    if repository is None:
        raise ValueError("target: expected an endpoint or a model repository, got neither; give one of them")
    version = repository.find(target.model, target.version)
    return EngineTarget.opened(version, device=device, threads=threads, settings=settings, wanted=target.input)
