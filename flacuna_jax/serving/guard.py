"""What a request must be before a route sees it: from a known host, with the key, of a limited size."""

import asyncio
import hmac
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flacuna_jax.errors import UserError

OPEN_PATHS = ("/", "/health")
"""Paths that need no key: the page, which asks for it, and the health check."""
BODY_SECONDS = 30.0

KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_response(status: int, message: str) -> JSONResponse:
    """An error in OpenAI's form."""
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(error_body(status, message), status, headers)


def error_body(status: int, message: str) -> dict[str, Any]:
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


@dataclass(frozen=True)
class Guard:
    """Passes requests on, or refuses them.

    Attributes:
      hosts: allowed names in the Host header, so that no website can reach a server on this machine through a name of
        its own (DNS rebinding); empty allows all.
      key: what `Authorization: Bearer` must have; None needs none.
    """

    app: ASGIApp
    hosts: Sequence[str] = ()
    key: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        refused = self._refused(request)
        await (refused or self.app)(scope, receive, send)

    def _refused(self, request: Request) -> JSONResponse | None:
        name = re.sub(r":\d*$", "", request.headers.get("host", ""))
        if self.hosts and name not in self.hosts:
            return error_response(403, f"this server does not answer for the host {name[:80]!r}")
        if self.key is None or request.url.path in OPEN_PATHS:
            return None
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.key.encode()):
            return error_response(401, "the API key is missing or wrong (Authorization: Bearer KEY)")
        return None


class TooLarge(Exception):
    """The body is larger than the limit."""


async def read_json(request: Request, limit: int) -> Any:
    """The body of a request.

    Raises:
      TooLarge: it has more bytes than `limit`.
      UserError: it is not JSON, or does not say so: without the header, a website could send it to a server on this
        machine.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise UserError("the body must be JSON, with the header Content-Type: application/json")
    body = bytearray()
    async with asyncio.timeout(BODY_SECONDS):
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise TooLarge
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is not JSON: {str(error)[:100]}") from None
