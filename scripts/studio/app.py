"""
The server: every route behind the guard, as one ASGI app for uvicorn.

    server = server_of(Engine(), token, port=8741)
    server.run(sockets=[listening])
"""

import functools
import secrets
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from . import endpoint, look, runs, talk
from .engine import Engine
from .guard import Guard, Protocol, Refused, refusal

PAGE = Path(__file__).with_name("page.html")
POLICY = ("default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; img-src data:; "
          "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def build(engine: Engine, token: str, port: int, host: str = "127.0.0.1", **limits) -> Guard:
    """The ASGI app that is served at host and port; limits are Guard's."""
    def page(request: Request):
        nonce = secrets.token_urlsafe(16)
        text = PAGE.read_text(encoding="utf-8")
        return HTMLResponse(text.replace("__TOKEN__", token).replace("__NONCE__", nonce), headers={
            "content-security-policy": POLICY.format(nonce)})

    def missing(request: Request, error: HTTPException):
        return refusal(request, Refused(f"{request.method} {request.scope['path']!r:.80}: "
                                        f"{error.detail}", error.status_code))
    app = Starlette(
        routes=[Route("/", page), *runs.routes(), *look.routes(), *talk.routes(engine),
                *endpoint.routes(engine)],
        exception_handlers={HTTPException: missing, ValueError: refusal, Exception: refusal,
                            ClientDisconnect: lambda request, error: Response(status_code=499)})
    app.router.redirect_slashes = False
    return Guard(app, token, port, host, **limits)


class Server(uvicorn.Server):
    """uvicorn's server; Ctrl-C stops its answers first."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig, frame):
        self.engine.close()
        super().handle_exit(sig, frame)


def server_of(engine: Engine, token: str, port: int, host: str = "127.0.0.1", clients: int = 128,
              **limits) -> Server:
    """The server, to be run on a listening socket. clients is how many may be there at once."""
    config = uvicorn.Config(
        build(engine, token, port, host, **limits), lifespan="off", ws="none", loop="asyncio",
        http=functools.partial(Protocol, seconds=limits.get("seconds", 20)), log_level="warning",
        access_log=False, server_header=False, proxy_headers=False, limit_concurrency=clients,
        timeout_graceful_shutdown=2)
    return Server(config, engine)
