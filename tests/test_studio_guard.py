"""scripts/studio/guard.py: what other websites, other machines and slow clients cannot do."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import test_studio_endpoint
from test_project import ROOT
from test_studio_endpoint import TOKEN, answer, asking, connected, served, wait_for

from scripts.studio import __main__ as command
from scripts.studio import app
from scripts.studio.guard import is_loopback

studio = test_studio_endpoint.studio
EVIL = "http://evil.example"
OPENED = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate",
          "Sec_Fetch_Dest": "document"}


def ask(studio, path="/api/voices", method="GET", body=b"", **headers):
    return answer(studio, body, path, method, **{"X_Token": TOKEN, **headers})


@pytest.fixture
def strict(home):
    """A server with small limits."""
    with served(home, seconds=1.5, body=1000, upload=3000, clients=6) as studio:
        yield studio


# ----- who ---------------------------------------------------------------------------------------


def test_the_page_comes_with_its_token_and_strict_headers(studio):
    status, headers, page = ask(studio, "/", X_Token=None)
    assert status == 200 and TOKEN.encode() in page and b"__TOKEN__" not in page
    policy = headers["content-security-policy"]
    nonce = policy.partition("'nonce-")[2].partition("'")[0]
    assert len(nonce) > 20 and page.count(nonce.encode()) == 2
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert nonce not in ask(studio, "/")[1]["content-security-policy"]


@pytest.mark.parametrize("path, status", [("/", 200), ("/api/voices", 200), ("/v1/models", 200),
                                          ("/api/voices?x", 200), ("/api/none", 404),
                                          ("/favicon.ico", 404), ("/v1/none", 404)])
def test_every_answer_is_sealed(studio, path, status):
    found, headers, body = ask(studio, path)
    assert found == status and headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer" and headers["cache-control"] == "no-store"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers
    if status == 404:
        error = json.loads(body)["error"]
        assert isinstance(error, dict if path.startswith("/v1") else str)


@pytest.mark.parametrize("path", ["/", "/api/voices", "/v1/models"])
def test_a_forged_host_is_refused(studio, path):
    port = studio.port
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", f"LocalHost:{port}"):
        assert ask(studio, path, Host=host)[0] == 200
    for host in (f"evil.example:{port}", "evil.example", "127.0.0.1", f"127.0.0.1:{port + 1}",
                 f"localhost:{port}.evil.example", "", "[::", f"user@localhost:{port}", "\xff"):
        status, _, body = ask(studio, path, Host=host)
        assert status == 403 and TOKEN.encode() not in body, host


@pytest.mark.parametrize("path, method", [("/", "GET"), ("/api/voices", "GET"),
                                          ("/v1/models", "GET"), ("/v1/chat/completions", "POST"),
                                          ("/v1/chat/completions", "OPTIONS")])
def test_another_origin_is_refused_and_starts_nothing(studio, path, method):
    own = f"http://127.0.0.1:{studio.port}"
    for origin in (EVIL, "null", own.replace("http", "https"), own + "0", "http://127.0.0.1", "",
                   f"http://localhost:{studio.port}"):
        status, headers, _ = ask(studio, path, method, asking(), Origin=origin)
        assert status == 403 and "access-control-allow-origin" not in headers, origin
    assert not studio.engine.busy
    if method != "OPTIONS":
        assert ask(studio, path, method, asking(), Origin=own)[0] == 200


def test_a_page_of_another_site_may_only_open_the_page(studio):
    for path, site in itertools.product(("/", "/api/voices", "/v1/models"),
                                        ("cross-site", "same-site")):
        assert ask(studio, path, Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors")[0] == 403
    for path, status in (("/", 200), ("/api/voices", 403), ("/v1/models", 403)):
        assert ask(studio, path, **OPENED)[0] == status
    assert ask(studio, "/", **OPENED | {"Sec_Fetch_Dest": "iframe"})[0] == 403
    assert ask(studio, "/", "POST", **OPENED)[0] == 403
    for site in ("same-origin", "none"):
        assert ask(studio, Sec_Fetch_Site=site)[0] == 200


def test_api_needs_the_pages_token(studio):
    for token in (None, "", "x", TOKEN[:-1], TOKEN + "x", "\xe9", TOKEN.upper()):
        for path in ("/api/voices", "/%61pi/voices", "/api/none"):
            status, _, body = ask(studio, path, X_Token=token)
            assert status == 403 and "reload the page" in json.loads(body)["error"]
    assert ask(studio)[0] == 200 and ask(studio, "/%61pi/voices")[0] == 200


def test_v1_needs_no_token_on_loopback(studio):
    assert ask(studio, "/v1/models", X_Token=None)[0] == 200


def test_other_machines_need_the_token_for_everything(home):
    with served(home, host="0.0.0.0") as studio:
        for path in ("/", "/?token=x", "/api/voices", "/v1/models", "/v1/none", "/x"):
            status, _, body = ask(studio, path, X_Token=None)
            assert status in (401, 403, 404) and TOKEN.encode() not in body, path
        quoted = TOKEN.replace(" ", "%20").replace("'", "%27")
        for path, headers in ((f"/?token={quoted}", {}), ("/api/voices", {"X_Token": TOKEN}),
                              ("/v1/models", {"Authorization": f"Bearer {TOKEN}"})):
            assert ask(studio, path, **{"X_Token": None, **headers})[0] == 200
            assert ask(studio, path, Host="my-machine:8741", **headers)[0] == 200
            assert ask(studio, path, Origin=EVIL, **headers)[0] == 403


@pytest.mark.parametrize("path", [
    "/v1/models/..", "/v1/models/../../config.json", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "/v1/models/a%00", "/v1/models//etc/passwd", "/../../etc/passwd", "//etc/passwd",
    "/%2e%2e/config.json", "/api/../v1/x", "http://evil.example/"])
def test_a_path_with_dots_leads_nowhere(studio, path):
    status, _, body = ask(studio, path)
    assert status == 404 and b"root:" not in body and "error" in json.loads(body)


# ----- how much, how long ------------------------------------------------------------------------


def test_a_body_of_1_gb_is_refused_before_it_comes(studio):
    for path, method in (("/v1/chat/completions", "POST"), ("/api/upload?name=x.jsonl", "POST"),
                         ("/", "GET"), ("/api/keep", "POST")):
        status, headers, body = ask(studio, path, method, Content_Length=2**30)
        assert status == 413 and headers["connection"] == "close" and b"more than" in body


def test_a_body_without_end_is_refused_while_it_comes(studio):
    part = b"10000\r\n" + b" " * 65536 + b"\r\n"
    with connected(studio, Content_Length=None, Transfer_Encoding="chunked") as connection:
        try:
            for _ in range(10_000):
                connection.sendall(part)
            pytest.fail("655 MB were read")
        except OSError:                                        # it was closed
            pass
    wait_for(lambda: not studio.server.server_state.tasks)
    with connected(studio, Content_Length=None, Transfer_Encoding="chunked") as connection:
        connection.sendall(part * 17)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_an_upload_may_be_larger_than_other_bodies(strict):
    assert ask(strict, "/api/keep", "POST", b" " * 1001)[0] == 413
    assert ask(strict, "/api/keep", "POST", b" " * 1000)[0] == 400
    assert ask(strict, "/api/upload", "POST", b" " * 1001)[0] != 413
    assert ask(strict, "/api/upload", "POST", b" " * 3001)[0] == 413


def test_a_body_that_comes_slowly_is_given_up(strict):
    for length in (5, None):
        encoding = {"Transfer_Encoding": "chunked"} if length is None else {}
        with connected(strict, b"1", Content_Length=length, **encoding) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
            while connection.recv(1000):
                continue
    wait_for(lambda: not strict.server.server_state.connections)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX: ", b"\r\n"])
def test_headers_that_come_slowly_are_given_up(strict, sent):
    whole = f"GET /v1/models HTTP/1.1\r\nHost: localhost:{strict.port}\r\n\r\n".encode()
    for first in (b"", whole) if sent else (b"",):             # later, uvicorn waits for 5 s
        with socket.create_connection(("127.0.0.1", strict.port)) as connection:
            connection.settimeout(60)
            connection.sendall(first)
            if first:
                assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
            connection.sendall(sent)
            try:
                while connection.recv(65536):
                    continue
            except ConnectionResetError:
                pass
    wait_for(lambda: not strict.server.server_state.connections)


def test_a_client_that_reads_nothing_is_given_up(strict):
    page = f"GET / HTTP/1.1\r\nHost: localhost:{strict.port}\r\n\r\n".encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", strict.port))
        connection.sendall(page * 400)                         # 24 MB of answers
        wait_for(lambda: strict.server.server_state.connections)
        wait_for(lambda: not strict.server.server_state.connections)
        with pytest.raises(ConnectionError):                   # it is the server that closed
            for _ in range(10_000):
                connection.sendall(page)
    assert ask(strict)[0] == 200                               # and it answers others


def test_too_many_connections_are_told_so(strict):
    idle = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(6)]
    wait_for(lambda: len(strict.server.server_state.connections) == 6)
    assert ask(strict)[0] == 503
    for connection in idle:
        connection.close()
    wait_for(lambda: not strict.server.server_state.connections)
    assert ask(strict)[0] == 200


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"A" * 100_000,
                                  b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n"])
def test_what_is_no_http_is_refused_and_the_server_lives(studio, sent):
    with socket.create_connection(("127.0.0.1", studio.port)) as connection:
        connection.settimeout(60)
        try:
            connection.sendall(sent + b"\r\n\r\n")
            assert b" 200 " not in connection.recv(100)
        except ConnectionResetError:
            pass
    assert ask(studio)[0] == 200


def test_a_websocket_is_not_opened(studio):
    headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "13",
               "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    for origin, status in ((EVIL, b"403"), (f"http://127.0.0.1:{studio.port}", b"404")):
        with connected(studio, b"", "/v1/x", "GET", Origin=origin, **headers) as connection:
            assert connection.recv(12) == b"HTTP/1.1 " + status


# ----- the command -------------------------------------------------------------------------------


def test_loopback_is_what_stays_on_this_machine():
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.8.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "my-machine", "", "x")))


def test_a_port_that_is_taken_is_an_error_or_the_next_one(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1, port {port}: .*--port"):
            command.listen("127.0.0.1", port)
        monkeypatch.setattr(command, "PORT", port)
        with command.listen("127.0.0.1", None) as found:
            assert found.getsockname()[1] > port
    assert f"port {port} is taken; this is " in capsys.readouterr().out
    with pytest.raises(ValueError, match="studio: 203.0.113.1, port .*assign requested address"):
        command.listen("203.0.113.1", None)                    # an address of nobody


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_command_says_where_it_is_and_opens_the_browser(home, monkeypatch, capsys, host):
    opened = []
    monkeypatch.chdir(home)
    monkeypatch.setattr(command, "PORT", 0)
    monkeypatch.setattr(command.webbrowser, "open", opened.append)
    monkeypatch.setattr(app.Server, "run", lambda *_, sockets: sockets[0].close())
    assert command.main(["--device=cpu", f"--host={host}"]) == 0
    out = capsys.readouterr().out
    wait_for(lambda: opened)
    assert opened[0] in out and "/v1, models tiny, " in out and "trainings go on" in out
    assert ("?token=" in opened[0]) == ("warning" in out) == (host == "0.0.0.0")
    command.main(["--device=cpu", "--no-browser"])
    assert len(opened) == 1


def test_ctrl_c_ends_it_while_an_answer_runs(home):
    command = [sys.executable, "-m", "scripts.studio", "--no-browser", "--port=0", "--device=cpu"]
    with subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        port = int(process.stdout.readline().rpartition(":")[2])
        body = asking(stream=True, max_tokens=900)
        with connected(SimpleNamespace(port=port), body) as connection:
            assert connection.recv(12) == b"HTTP/1.1 200"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
    assert errors.split() == ["stopped"] and process.returncode == 1


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_one_clear_line(package):
    code = (f"import sys; sys.modules[{package!r}] = None; from lora.run import cli; "
            "from scripts.studio.__main__ import main; cli.run(main, [])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"error: studio: {package}")
    assert done.stderr.endswith("is missing; pip install -r requirements-studio.txt\n")
