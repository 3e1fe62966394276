"""Web pages over the audit API.

browser --HTTP--> pages --service.client--> `tenet serve --state`
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse
from starlette.routing import Route

from protos.audit.v1 import audit_pb2
from service.errors import NotFound, ServiceError

if TYPE_CHECKING:
    from starlette.requests import Request

    from service.client import Client

# Audits on the first page; the command line lists more.
_SHOWN = 50

# Seconds between two looks of a page at an audit that has not ended.
_REFRESH_SECONDS = 2

_ENDED = {audit_pb2.AUDIT_STATE_SUCCEEDED, audit_pb2.AUDIT_STATE_FAILED, audit_pb2.AUDIT_STATE_CANCELLED}


def dashboard(client: Client) -> Starlette:
    """Return the web application; it asks the server at every request and keeps nothing."""
    environment = Environment(
        loader=PackageLoader("service.web", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["state"] = _state_name

    def render(name: str, *, refresh: bool, **values: object) -> HTMLResponse:
        seconds = _REFRESH_SECONDS if refresh else 0
        return HTMLResponse(environment.get_template(name).render(refresh=seconds, **values))

    def audits(_request: Request) -> HTMLResponse:
        found = client.audits(limit=_SHOWN)
        return render("audits.html.j2", refresh=any(audit.state not in _ENDED for audit in found), audits=found)

    def audit(request: Request) -> HTMLResponse:
        found = client.audit(request.path_params["id"])
        if found.state == audit_pb2.AUDIT_STATE_SUCCEEDED:
            return HTMLResponse(client.audit_report(found.id, html=True))
        return render("audit.html.j2", refresh=found.state not in _ENDED, audit=found)

    def failed(_request: Request, error: Exception) -> HTMLResponse:
        code = 404 if isinstance(error, NotFound) else 502
        if isinstance(error, HTTPException):
            code, error = error.status_code, ServiceError("there is no such page")
        page = render("error.html.j2", refresh=False, message=str(error))
        page.status_code = code
        return page

    return Starlette(
        routes=[Route("/", audits), Route("/audits/{id}", audit)],
        exception_handlers={ServiceError: failed, HTTPException: failed},
    )


def _state_name(state: audit_pb2.AuditState.ValueType) -> str:
    return audit_pb2.AuditState.Name(state).removeprefix("AUDIT_STATE_").lower()
