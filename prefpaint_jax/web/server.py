"""Guards and runs the small servers of this package; needs the extra `label`."""

import asyncio
import contextlib
import importlib.util
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import SplitResult, urlsplit

MOST_SECONDS = 30.0  # for a client to send a body
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# A page loads from its own server only, and its address, which may hold a token, is told to nobody.
HEADERS = {
  "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; "
  "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
  "x-content-type-options": "nosniff",
  "referrer-policy": "no-referrer",
  "cache-control": "no-store",
}
ASGI = Callable[[dict, Callable, Callable], Awaitable[None]]


def guarded(app: ASGI, most_bytes: int, hosts: tuple[str, ...] = LOOPBACK) -> ASGI:
  """Returns the app behind a guard.

  - A request must name one of the hosts, if there are any: another page that points its own name at
    this machine gets nothing.
  - A request that changes something must come from a page of the same host.
  - A body has at most `most_bytes`, and arrives within MOST_SECONDS.
  - Every response has HEADERS, unless the app sets one of them.
  """

  async def guard(scope: dict, receive: Callable, send: Callable) -> None:
    if scope["type"] != "http":
      return await app(scope, receive, send)
    headers = {name.decode("latin1"): value.decode("latin1") for name, value in scope["headers"]}
    if refusal := _refusal(scope["method"], headers, most_bytes, hosts):
      return await _answer(send, *refusal)

    async def sending(message: dict) -> None:
      if message["type"] == "http.response.start":
        given = {name.lower() for name, _ in message["headers"]}
        added = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in given]
        message = message | {"headers": [*message["headers"], *added]}
      await send(message)

    try:
      body = bytearray()
      if scope["method"] not in ("GET", "HEAD"):
        body = await asyncio.wait_for(_read(receive, most_bytes), MOST_SECONDS)
    except TimeoutError:
      return await _answer(send, 408, f"the request took more than {MOST_SECONDS:g} seconds")
    except ValueError as error:
      return await _answer(send, 413, str(error))
    except ConnectionError:
      return None  # nobody is there to answer
    pending = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def received() -> dict:
      return pending.pop() if pending else await receive()

    await app(scope, received, sending)

  return guard


async def bad_request(_: Any, error: Exception) -> Any:
  """Answers with the line of a ValueError: one of an app's `exception_handlers`."""
  from starlette.responses import PlainTextResponse

  return PlainTextResponse(str(error), 400)


def _refusal(
  method: str, headers: dict[str, str], most_bytes: int, hosts: tuple[str, ...]
) -> tuple[int, str] | None:
  """Returns the status and the line for a request that the headers already forbid."""
  host, origin = headers.get("host", ""), headers.get("origin")
  if hosts and _split(f"//{host}").hostname not in hosts:
    return 421, f"unknown host {host!r}; expected {' or '.join(hosts)}"
  if method in ("GET", "HEAD"):
    return None
  if origin is not None and _split(origin).netloc != host:
    return 403, f"a page of {origin} may not change anything here"
  length = headers.get("content-length", "0")
  if not length.isdecimal() or int(length) > most_bytes:
    return 413, f"the request has {length} bytes; expected at most {most_bytes}"
  return None


def _split(address: str) -> SplitResult:
  """Splits an address; a malformed one has no host."""
  try:
    return urlsplit(address)
  except ValueError:
    return urlsplit("")


async def _read(receive: Callable, most_bytes: int) -> bytearray:
  """Reads a whole body.

  Raises:
    ValueError: it has more than `most_bytes`.
    ConnectionError: the client went away before its end.
  """
  body = bytearray()
  while True:
    message = await receive()
    if message["type"] == "http.disconnect":
      raise ConnectionError
    body += message.get("body", b"")
    if len(body) > most_bytes:
      raise ValueError(f"the request has more than {most_bytes} bytes")
    if not message.get("more_body"):
      return body


async def _answer(send: Callable, status: int, line: str) -> None:
  """Sends one line of text and closes the connection, which may still hold a body."""
  headers = {"content-type": "text/plain; charset=utf-8", "connection": "close"} | HEADERS
  pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
  await send({"type": "http.response.start", "status": status, "headers": pairs})
  await send({"type": "http.response.body", "body": line.encode()})


def check_installed() -> None:
  """Raises ValueError if a package of the extra `label` is missing."""
  if not (importlib.util.find_spec("starlette") and importlib.util.find_spec("uvicorn")):
    raise ValueError("needs Starlette and uvicorn: pip install starlette uvicorn")


def is_loopback(host: str) -> bool:
  """Whether a server on this address is reached from this machine only."""
  with contextlib.suppress(ValueError):
    return ipaddress.ip_address(host).is_loopback
  return host == "localhost"


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
  """Yields a socket that listens; port 0 takes a free one.

  Raises:
    ValueError: the address is not of this machine, or another program has the port.
  """
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    opened = socket.create_server((host, port), family=family)
  except OSError as error:
    raise ValueError(f"--host={host} --port={port}: {error.strerror or error}") from None
  with opened:
    yield opened


def address(host: str, opened: socket.socket) -> str:
  """Returns the address that a browser opens for a socket of `listening`."""
  if host in ("0.0.0.0", "::"):  # every address of this machine
    host = socket.gethostname()
  return f"http://{f'[{host}]' if ':' in host else host}:{opened.getsockname()[1]}/"


def serve(app: Any, opened: socket.socket) -> None:
  """Answers requests until SIGINT or SIGTERM."""
  import uvicorn

  config = uvicorn.Config(
    app,
    log_level="warning",
    access_log=False,
    lifespan="off",  # at a second Ctrl-C uvicorn prints a traceback of the task of lifespan
    timeout_keep_alive=15,
    limit_concurrency=256,
  )
  uvicorn.Server(config).run(sockets=[opened])
