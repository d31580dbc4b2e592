"""What a browser may do with the pages: nothing that comes from, or goes to, somewhere else.

Rules:
    1. Every answer carries the headers below: no script, style, image or request of another
       origin, none inline, no frame around a page, no text that becomes markup.
    2. A request that changes something must come from a page of this origin.  The browser says
       so in headers that a page cannot forge (Sec-Fetch-Site, Origin); without either it is no
       browser, and belongs to ``/fleet``.
"""

from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import AccessDeniedError

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-cache",
}


class StrictHeaders:
    """Adds the headers to every answer.

    Args:
        app: What answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def check_same_origin(headers: Headers) -> None:
    """Pass a request of a page of this origin.

    Raises:
        AccessDeniedError: It is another's, or does not say.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    is_said = site is not None or origin is not None
    is_same_site = site is None or site == "same-origin"
    is_same_host = origin is None or urlsplit(origin).netloc == headers.get("host")
    if not (is_said and is_same_site and is_same_host):
        message = f"origin: expected a request of this console, got one of {origin or site!r:.80}"
        raise AccessDeniedError(message)
