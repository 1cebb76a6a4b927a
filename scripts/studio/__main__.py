"""
One local page: runs while they train, their data, and talk with base and adapters; and an endpoint
for any client that speaks OpenAI's protocol.

    python -m scripts.studio                          # http://127.0.0.1:8741, in your browser
    python -m scripts.studio --no-browser --port 9000
    python -m scripts.studio --host 0.0.0.0           # for other machines, with a token

A website in another tab can neither read nor start anything. Ctrl-C ends the server; trainings that
it started go on.
"""

import errno
import secrets
import socket
import sys
import threading
import webbrowser

from lora.run import cli

PORT = 8741


def main(argv: list[str]) -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at")
    parser.add_argument("--port", type=int, help=f"default: {PORT}, or the next that is free")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"),
                        help="of the answers")
    options = parser.parse_args(argv)
    try:
        from .app import server_of
        from .engine import Engine, entries
        from .guard import is_loopback
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise ValueError(f"studio: {error.name} is missing; pip install -r "
                         "requirements-studio.txt") from error
    listening = listen(options.host, options.port)
    port, token = listening.getsockname()[1], secrets.token_urlsafe(24)
    engine = Engine(options.device)
    server = server_of(engine, token, port, options.host)
    host = socket.gethostname() if options.host in ("0.0.0.0", "::") else options.host
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    page = address if is_loopback(options.host) else f"{address}/?token={token}"
    print(f"studio: {page}\nstudio: for OpenAI's clients: {address}/v1, models "
          f"{', '.join(entries()[0]) or 'none yet'}")
    if page != address:
        print(f"studio: warning: whoever has the token can train and talk here, and the network "
              f"can read it; clients of /v1 need it as API key: {token}")
    print("studio: Ctrl-C ends it; trainings go on", flush=True)
    if not options.no_browser:
        threading.Thread(target=webbrowser.open, args=[page], daemon=True).start()
    try:
        server.run(sockets=[listening])
    finally:
        engine.close()
        engine.worker.join(2)
    return 0


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens at a port; without one at the first free one from PORT on."""
    first, last = (PORT, PORT + 99) if port is None else (port, port)
    for candidate in range(first, last + 1):
        try:
            family = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0][0]
            found = socket.create_server((host, candidate), family=family)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and candidate < last:
                continue
            reason = str(error.strerror).partition(" (")[0]
            raise ValueError(f"studio: {host}, port {candidate}: {reason}; choose others with "
                             "--host and --port") from error
        if candidate > first:
            print(f"studio: port {first} is taken; this is {candidate}")
        return found


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
