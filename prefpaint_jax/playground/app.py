"""The web application of the page: images come in, jobs are asked for, results go out.

Everything is in memory: the last uploads, and the results of the last jobs. Whoever knows the key
of an image or a job may read it; keys are random. The calls are
  GET    /api/state            what the models are and can do
  POST   /api/images           an image file -> its key, its size
  POST   /api/jobs             {"image", "mask", "steps", ...} -> a job
  GET    /api/jobs/JOB         its state, and its result
  DELETE /api/jobs/JOB         cancels it
  GET    /images/KEY           a PNG; no token, because an <img> sends none
"""

import base64
import binascii
import hmac
import json
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefpaint_jax.playground.jobs import Busy, Job, Queue, Shelf
from prefpaint_jax.playground.painter import RANGES, Painter, Settings, Upload, read_mask
from prefpaint_jax.web.server import ASGI, HEADERS, LOOPBACK, bad_request, guarded, is_loopback

MOST_BYTES = 20 * 2**20  # of an image file, and of a request
MOST_UPLOADS = 256 * 2**20  # bytes
MOST_RESULTS = 1024 * 2**20
PAGE = Path(__file__).with_name("page")
FILES = {
  "index.html": "text/html; charset=utf-8",
  "demo.css": "text/css; charset=utf-8",
  "demo.js": "text/javascript; charset=utf-8",
  "canvas.js": "text/javascript; charset=utf-8",
  "samples.js": "text/javascript; charset=utf-8",
}


class Refused(Exception):
  """A request that gets another status than 400: (status, line)."""


class Playground:
  """The state behind the page.

  Args:
    painter: the models.
    queue: of the jobs.
  """

  def __init__(self, painter: Painter, queue: Queue):
    self._painter, self._queue = painter, queue
    self._uploads, self._results = Shelf(MOST_UPLOADS), Shelf(MOST_RESULTS)
    examples = list(painter.examples())
    self._examples = Shelf(MOST_UPLOADS)
    uploads = [upload for upload, _ in examples]
    masks = [mask for _, mask in examples]
    keys = self._examples.add([*uploads, *masks], size=0)
    pairs = zip(uploads, keys[: len(uploads)], masks, keys[len(uploads) :], strict=True)
    self._shown = [
      self._describe(upload, key) | {"mask": None if mask is None else mask_key}
      for upload, key, mask, mask_key in pairs
    ]

  def state(self) -> dict[str, Any]:
    """Returns what the page shows before it has an image."""
    return {
      "policies": self._painter.names,
      "reward": self._painter.reward_name,
      "texts": self._painter.has_texts,
      "defaults": Settings()._asdict(),
      "most": {name: int(allowed.high) for name, allowed in RANGES.items()},
      "examples": self._shown,
    }

  def upload(self, content: bytes) -> dict[str, Any]:
    """Keeps an image file; raises ValueError if it is none."""
    upload = self._painter.open(content)
    (key,) = self._uploads.add([upload], len(upload.content) + len(upload.shown))
    return self._describe(upload, key)

  def _describe(self, upload: Upload, key: str) -> dict[str, Any]:
    sizes = {"full": upload.full, "works": self._painter.working_size(upload)}
    described = {name: [width, height] for name, (height, width) in sizes.items()}
    height, width = upload.size
    return {"image": key, "width": width, "height": height} | described

  def start(self, asked: Any) -> dict[str, Any]:
    """Adds a job; raises ValueError for a wrong request."""
    if not isinstance(asked, dict):
      raise ValueError("the request is no JSON object; send image, mask and settings")
    key, mask = (asked.pop(name, None) for name in ("image", "mask"))
    settings = Settings.parse(asked)
    upload = self._find(key)
    if not isinstance(upload, Upload):
      raise Refused(404, "the image is no longer on the server; choose it again")
    try:
      content = base64.b64decode(mask, validate=True)
    except (TypeError, ValueError, binascii.Error):
      raise ValueError("mask: expected a PNG in base64") from None
    work = lambda job: self._work(upload, content, settings, job)
    try:
      job = self._queue.add(work, self._painter.kind(upload, settings))
    except Busy as error:
      raise Refused(503, str(error)) from None
    return self._queue.describe(job.id)

  def _work(self, upload: Upload, mask: bytes, settings: Settings, job: Job) -> dict[str, Any]:
    """Runs a job: inpaints, and keeps the files."""
    results = self._painter.paint(upload, read_mask(mask, upload.size), settings, job)
    files = [png for one in results for png in (*one["files"], *one["shown"])]
    keys = iter(self._results.add(files, sum(map(len, files))))
    for one in results:
      for name in ("files", "shown"):
        one[name] = [next(keys) for _ in one[name]]
    return {"policies": results, **settings._asdict()}

  def job(self, name: str, cancels: bool = False) -> dict[str, Any]:
    """Returns the state of a job, after it is cancelled if `cancels`."""
    try:
      if cancels:
        self._queue.cancel(name)
      return self._queue.describe(name)
    except KeyError:
      raise Refused(404, "no such job; it may be too old") from None

  def png(self, key: str) -> bytes:
    """Returns the PNG of a key."""
    found = self._find(key)
    if found is None:
      raise Refused(404, "no such image; it may be too old")
    return found.shown if isinstance(found, Upload) else found

  def _find(self, key: Any) -> Any | None:
    """Returns the upload or the PNG of a key."""
    shelves = (self._examples, self._uploads, self._results)
    found = (shelf.get(key) for shelf in shelves) if isinstance(key, str) else ()
    return next((one for one in found if one is not None), None)


def make_app(playground: Playground, token: str | None, hosts: tuple[str, ...] = LOOPBACK) -> ASGI:
  """Makes the application.

  Args:
    token: what requests must send, if it is not None.
    hosts: as for `web.server.guarded`.
  """
  from starlette.applications import Starlette
  from starlette.concurrency import run_in_threadpool
  from starlette.requests import Request
  from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
  from starlette.routing import Route

  async def page(request: Request) -> Response:
    name = request.path_params.get("file", "index.html")
    if name not in FILES:
      raise Refused(404, "no such file")
    return FileResponse(PAGE / name, media_type=FILES[name])

  async def state(_: Request) -> Response:
    return JSONResponse(playground.state())

  async def images(request: Request) -> Response:
    kind = request.headers.get("content-type", "")
    if not (kind.startswith("image/") or kind == "application/octet-stream"):
      raise Refused(415, f"the content type is {kind[:80]!r}; expected an image file")
    return JSONResponse(await run_in_threadpool(playground.upload, await request.body()))

  async def jobs(request: Request) -> Response:
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0] != "application/json":
      raise Refused(415, f"the content type is {kind[:80]!r}; expected application/json")
    asked = _parse(await request.body())
    return JSONResponse(await run_in_threadpool(playground.start, asked))

  async def job(request: Request) -> Response:
    cancels = request.method == "DELETE"
    return JSONResponse(playground.job(request.path_params["job"], cancels))

  async def png(request: Request) -> Response:
    return Response(playground.png(request.path_params["key"]), media_type="image/png")

  async def refused(_: Request, error: Exception) -> Response:
    status, line = error.args
    return PlainTextResponse(line, status)

  app = Starlette(
    routes=[
      Route("/", page),
      Route("/static/{file}", page),
      Route("/api/state", state),
      Route("/api/images", images, methods=["POST"]),
      Route("/api/jobs", jobs, methods=["POST"]),
      Route("/api/jobs/{job}", job, methods=["GET", "DELETE"]),
      Route("/images/{key}", png),
    ],
    exception_handlers={ValueError: bad_request, Refused: refused},
  )
  return _with_token(guarded(app, MOST_BYTES, hosts), token)


def _with_token(app: ASGI, token: str | None) -> ASGI:
  """Returns the app behind a token, which is checked before a body is read."""
  if token is None:
    return app

  async def checked(scope: dict, receive: Callable, send: Callable) -> None:
    given = dict(scope.get("headers", ())).get(b"authorization", b"")
    is_open = not scope.get("path", "").startswith("/api/")
    if is_open or hmac.compare_digest(given, f"Bearer {token}".encode()):
      return await app(scope, receive, send)
    from starlette.responses import PlainTextResponse

    line = "the link lacks its token, or has another one; open the link that the server printed"
    await PlainTextResponse(line, 401, HEADERS | {"connection": "close"})(scope, receive, send)

  return checked


def check_access(host: str, token: str | None) -> None:
  """Raises ValueError for a weak token, and for other machines without one."""
  new = secrets.token_urlsafe(16)
  if token is not None and not re.fullmatch(r"[\w-]{16,200}", token, re.ASCII):
    raise ValueError(
      f"--token has {len(token)} characters; expected 16 to 200 of A-Z a-z 0-9 - _; give one such "
      f"as {new}"
    )
  if token is None and not is_loopback(host):
    raise ValueError(f"--host={host} is reached from other machines; give --token={new}")


def _parse(body: bytes) -> Any:
  """Parses JSON; raises ValueError in one line."""
  try:
    return json.loads(body)
  except (ValueError, RecursionError):
    raise ValueError("the request is no JSON; send an object") from None
