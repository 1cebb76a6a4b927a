"""
What stands between the network and the routes: who may ask, how much, how long; errors as JSON.

    Guard(app, token="...", port=8741)         # ASGI; loopback: /api needs the token, /v1 none
    Guard(app, token="...", host="0.0.0.0")    # any machine may ask, everything needs the token

A website in another tab can send requests to this machine. It gives itself away by Host (a name of
its own that leads here), Origin or Sec-Fetch-Site, and it does not know the page's token.
"""

import asyncio
import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Iterable

from starlette.datastructures import MutableHeaders, QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error",
         500: "server_error", 503: "server_error"}
HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
           "cache-control": "no-store", "cross-origin-resource-policy": "same-origin",
           "content-security-policy": "default-src 'none'; frame-ancestors 'none'"}


class Refused(ValueError):
    """A request that is not done, with its HTTP status; param and code go into /v1's errors."""

    def __init__(self, message: str, status: int = 400, param: str | None = None,
                 code: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}


def refusal(request: Request, error: Exception) -> JSONResponse:
    """The answer to a request that failed: {"error": text}, under /v1 as the protocol has it."""
    known = isinstance(error, ValueError)
    status = getattr(error, "status", 400 if known else 500)
    text = str(error) if known else f"the request failed: {error!r}; see the terminal"
    content = in_protocol(text, status, getattr(error, "param", None), getattr(error, "code", None))
    return JSONResponse(content if request.scope["path"].startswith("/v1") else {"error": text},
                        status, getattr(error, "headers", None))


def in_protocol(text: str, status: int, param: str | None = None, code: str | None = None):
    """An error as OpenAI's clients read it."""
    kind = KINDS.get(status, "invalid_request_error")
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


async def read_object(request: Request) -> dict:
    """The JSON object in a request's body."""
    try:
        found = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise Refused(f"the body is {type(found).__name__}; expected a JSON object")
    return found


def number(asked: dict, name: str, default, low: float, high: float, kind=(int, float)):
    """A number of a request, or the default where it is absent or null."""
    value = default if asked.get(name) is None else asked[name]
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        whole = "a whole number" if kind is int else "a number"
        raise Refused(f"{name} is {value!r:.60}; expected {whole} from {low:g} to {high:g}",
                      param=name)
    return value


def text_of(value: object, where: str) -> str:
    """A text of a request that is one, without halves of surrogate pairs."""
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        raise Refused(f"{where} is {value!r:.60}; expected a text", param=where)
    return value


async def while_there(request: Request, answer: Awaitable):
    """Await an answer as long as its client is there; ClientDisconnect when it goes away."""
    async def leaving():
        while (await request.receive())["type"] != "http.disconnect":
            continue
    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(leaving())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


class Events(StreamingResponse):
    """Server-sent events; done() is called at the end, also where the client goes away early."""

    media_type = "text/event-stream"

    def __init__(self, events: Iterable, done: Callable):
        super().__init__(events)
        self.done = done

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.done()


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """The ASGI app behind the checks. seconds is how long a body may take, the sizes are bytes."""

    def __init__(self, app, token: str, port: int, host: str = "127.0.0.1", seconds: float = 20,
                 body: int = 2**20, upload: int = 2**25):
        self.app, self.token, self.local = app, token.encode(), is_loopback(host)
        self.seconds, self.body, self.upload = seconds, body, upload
        names = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host}
        self.hosts = {f"{name}:{port}" for name in names} | (names if port == 80 else set())

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope, receive)

        async def sealed(message):
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)
        try:
            self.check(request)
            body = await self.read(request)
        except ClientDisconnect:
            return None
        except Refused as error:                       # the rest of the body is not read
            error.headers["connection"] = "close"
            return await refusal(request, error)(scope, receive, sealed)
        told = [{"type": "http.request", "body": body, "more_body": False}]

        async def again():
            return told.pop() if told else await receive()
        return await self.app(scope, again, sealed)

    def check(self, request: Request) -> None:
        """Raise Refused for what another website sends, and for a wrong token."""
        headers, path = request.headers, request.scope["path"]
        host = headers.get("host", "")
        if self.local and host.lower() not in self.hosts:
            raise Refused(f"the Host {host!r:.80} is not this server's", 403)
        if any(origin != f"http://{host}" for origin in headers.getlist("origin")):
            raise Refused("a page of another origin may not ask here", 403)
        opened = (request.method, path, headers.get("sec-fetch-mode"),
                  headers.get("sec-fetch-dest")) == ("GET", "/", "navigate", "document")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not opened:
            raise Refused("a page of another site may not ask here", 403)
        if path.startswith("/api/"):
            self.compare(headers.get("x-token", ""), 403, "the header X-Token is not the page's; "
                         "reload the page")
        elif path.startswith("/v1/"):
            if not self.local:
                self.compare(headers.get("authorization", "").removeprefix("Bearer "), 401,
                             "the API key is not the token that the server printed")
        elif path != "/":
            raise Refused(f"there is no {path!r:.80}", 404)
        elif not self.local:
            token = QueryParams(request.scope["query_string"]).get("token", "")
            self.compare(token, 403, "open the address with the token that the server printed")

    def compare(self, given: str, status: int, message: str) -> None:
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self.token):
            raise Refused(message, status)

    async def read(self, request: Request) -> bytes:
        """The body, whole; Refused if it is too large or takes too long."""
        limit = self.upload if request.scope["path"] == "/api/upload" else self.body
        large = Refused(f"the body has more than {limit} bytes", 413)
        if int(request.headers.get("content-length", 0)) > limit:
            raise large
        body = bytearray()
        try:
            async with asyncio.timeout(self.seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise large
        except TimeoutError:
            raise Refused(f"the body took longer than {self.seconds:g} s", 408) from None
        return bytes(body)


class Protocol(H11Protocol):
    """uvicorn's HTTP, which also closes connections that send no whole header in some seconds, or
    read nothing of their answer."""

    def __init__(self, *args, seconds: float = 20, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds, self.timers = seconds, {}

    def set_timer(self, name: str, on: bool) -> None:
        if not on and name in self.timers:
            self.timers.pop(name).cancel()
        elif on and name not in self.timers:
            self.timers[name] = self.loop.call_later(self.seconds, self.transport.abort)

    def connection_made(self, transport):
        super().connection_made(transport)
        self.set_timer("header", True)

    def data_received(self, data):
        super().data_received(data)
        self.set_timer("header", self.cycle is None or self.cycle.response_complete)

    def pause_writing(self):
        super().pause_writing()
        self.set_timer("reading", True)

    def resume_writing(self):
        super().resume_writing()
        self.set_timer("reading", False)

    def connection_lost(self, exc):
        for name in [*self.timers]:
            self.set_timer(name, False)
        super().connection_lost(exc)
