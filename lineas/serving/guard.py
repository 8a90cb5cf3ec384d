"""What keeps web pages of others away from the server, and requests out that are too large.

A page of any site may send requests to a server on this machine, and by a name of its own that it lets point here
(DNS rebinding) read the answers, too. Such requests tell by their Host or by their Origin.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

LARGEST = 8 * 2**20
"""Bytes of a request."""


def _name(host: str) -> str | None:
    """The name in a Host header."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """Refuses requests to hosts and from pages that are not known, and large ones.

    Parameters
    ----------
    app : ASGI application
        What is guarded.
    hosts : iterable of str
        Names of the server besides localhost and this machine's own. Addresses are always taken: nobody else's name is
        one.
    origins : iterable of str
        Pages besides the server's own, such as ``http://localhost:3000``.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str] = (), origins: Iterable[str] = ()) -> None:
        self.app, self.origins = app, frozenset(origins)
        self.hosts = frozenset(one.lower() for one in ("localhost", socket.gethostname(), *hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or answer why not."""
        if scope["type"] != "http":  # of web sockets there are none behind it
            await self.app(scope, receive, send)
            return
        error = self._look(Headers(scope=scope))
        if error is not None:
            await error.response()(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > LARGEST:
                raise _too_large()
            return message

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        await self.app(scope, counted, marked)

    def _look(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        name = _name(host)
        if name is None or not (name in self.hosts or _is_address(name)):
            return ApiError(403, f"this server is not called {host!r}: allow the name with --allow-host if it is")
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and origin.split("://", 1)[-1] != host:
            return ApiError(
                403, f"pages of {origin!r} may not use the server: start it with --allow-origin to let them"
            )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > LARGEST:
            return _too_large()
        return None


def _too_large() -> ApiError:
    return ApiError(413, f"the request must have at most {LARGEST} bytes")
