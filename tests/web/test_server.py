"""The guard of a server: hosts, origins, sizes, slow clients, headers."""

import asyncio
import socket

import pytest

from prefpaint_jax.web import server

starlette = pytest.importorskip("starlette", reason="needs the extra label: pip install starlette")
pytest.importorskip("httpx", reason="needs httpx: pip install httpx")
from starlette.applications import Starlette  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402


async def echo(request):
  body = await request.body()
  if body == b"bad":
    raise ValueError("the body is bad; send another")
  return PlainTextResponse(body)


@pytest.fixture
def client():
  routes = [Route("/", echo, methods=["GET", "POST"])]
  app = Starlette(routes=routes, exception_handlers={ValueError: server.bad_request})
  return TestClient(server.guarded(app, most_bytes=100), base_url="http://127.0.0.1:8000")


def test_answers_have_strict_headers(client):
  answer = client.post("/", content=b"hello")
  assert answer.text == "hello"
  assert "default-src 'self'" in answer.headers["content-security-policy"]
  assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
  ("status", "headers", "body", "line"),
  [
    (421, {"host": "evil.example"}, b"", "unknown host 'evil.example'"),
    (421, {"host": "["}, b"", "unknown host '['"),
    (403, {"origin": "http://evil.example"}, b"", "a page of http://evil.example may not"),
    (403, {"origin": "http://["}, b"", "a page of http://[ may not"),
    (413, {}, b"x" * 101, "101 bytes; expected at most 100"),
    (413, {}, iter([b"x" * 60, b"x" * 60]), "more than 100 bytes"),
    (400, {}, b"bad", "the body is bad; send another"),
  ],
)
def test_requests_are_refused_in_one_line(client, status, headers, body, line):
  answer = client.post("/", content=body, headers=headers)
  assert (answer.status_code, line in answer.text) == (status, True), answer.text
  assert answer.headers["x-content-type-options"] == "nosniff"


def test_slow_client_is_refused(client, monkeypatch):
  async def never(receive, most_bytes):
    await asyncio.sleep(60)

  monkeypatch.setattr(server, "MOST_SECONDS", 0.01)
  monkeypatch.setattr(server, "_read", never)
  assert client.post("/").status_code == 408


def test_part_of_a_body_does_not_reach_the_app():
  reached, sent = [], []
  messages = [
    {"type": "http.request", "body": b"{}", "more_body": True},
    {"type": "http.disconnect"},
  ]

  async def app(scope, receive, send):
    reached.append(await receive())

  async def receive():
    return messages.pop(0)

  async def send(message):
    sent.append(message)

  scope = {"type": "http", "method": "POST", "headers": []}
  asyncio.run(server.guarded(app, most_bytes=100, hosts=())(scope, receive, send))
  assert not reached and not sent


def test_two_servers_cannot_have_one_port():
  with server.listening("127.0.0.1", 0) as opened:
    port = opened.getsockname()[1]
    taken = rf"\A--host=127.0.0.1 --port={port}: .*in use"
    with pytest.raises(ValueError, match=taken), server.listening("127.0.0.1", port):
      pass
  assert server.is_loopback("127.0.0.1") and server.is_loopback("::1")
  assert not server.is_loopback("0.0.0.0") and not server.is_loopback("example.org")


@pytest.mark.parametrize(
  ("host", "named"),
  [("127.0.0.1", "127.0.0.1"), ("localhost", "localhost"), ("::1", "[::1]")]
  + [(every, socket.gethostname()) for every in ("0.0.0.0", "::")],
)
def test_printed_address_names_a_host_that_a_browser_reaches(host, named):
  with server.listening("127.0.0.1", 0) as opened:
    assert server.address(host, opened) == f"http://{named}:{opened.getsockname()[1]}/"


def test_missing_package_is_named_with_its_command(monkeypatch):
  server.check_installed()
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else name)
  with pytest.raises(ValueError, match=r"\Aneeds .*: pip install starlette uvicorn"):
    server.check_installed()
