"""Targets as a report names them: an engine to the byte, an endpoint by its address."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.audit.report import TargetReport
from service.audit.target.endpoint import EndpointTarget

if TYPE_CHECKING:
    from export.repository import Version
    from service.audit.target.base import Target


def target(attacked: Target, version: Version | None) -> TargetReport:
    """Return what a report says of a target.

    Args:
        attacked: open.
        version: in the model repository; None for an endpoint's.
    """
    if version is not None:
        return engine(version, attacked)
    assert isinstance(attacked, EndpointTarget), f"{attacked.name} is neither of a repository nor at an endpoint"
    name, _, number = attacked.name.partition("@")
    return TargetReport(
        model=name,
        version=int(number) if number.isdecimal() else None,
        runtime="endpoint",
        endpoint=attacked.server,
        input=attacked.domain.kind,
        batch_sizes=attacked.batch_sizes,
    )


def engine(version: Version, attacked: Target) -> TargetReport:
    """Return what a report says of an engine of the repository."""
    manifest = version.manifest
    return TargetReport(
        model=manifest.model,
        version=manifest.version,
        sha256=manifest.sha256,
        runtime=manifest.runtime,
        precision=manifest.precision,
        input=attacked.domain.kind,
        batch_sizes=attacked.batch_sizes,
    )
