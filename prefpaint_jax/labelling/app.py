"""The server of labelling: JSON for the page, images by keys that tell nothing.

docs/labelling.md describes its use. Every answer is on disk before the server acknowledges it.
"""

from __future__ import annotations

from pathlib import Path

from absl import logging

from prefpaint_jax.labelling.session import Labelling
from prefpaint_jax.runtime.files import parse_json
from prefpaint_jax.web import server

PAGE = Path(__file__).parent / "page"
MOST_BYTES = 256 * 1024  # of a request
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_CACHED = {"cache-control": "private, max-age=86400"}  # an image of a key does not change


def make_app(labelling: Labelling, host: str = "127.0.0.1") -> server.ASGI:
  """Returns the ASGI app of a labelling, behind `web.server.guarded`.

  Args:
    host: address of the server. Without invitations the app answers to this name and loopback's.
  """
  from starlette.applications import Starlette
  from starlette.exceptions import HTTPException
  from starlette.requests import Request
  from starlette.responses import JSONResponse, Response
  from starlette.routing import Route

  files = {path.name: path.read_bytes() for path in PAGE.iterdir() if path.suffix in _TYPES}

  def annotator(request: Request) -> str:
    try:
      return labelling.annotator(request.headers)
    except ValueError as error:
      raise HTTPException(401, str(error)) from None

  async def page(request: Request) -> Response:
    name = request.path_params.get("file", "index.html")
    if name not in files:
      raise HTTPException(404, "no such file")
    return Response(files[name], media_type=_TYPES[Path(name).suffix])

  async def mode(_: Request) -> Response:
    return JSONResponse({"open": labelling.is_open})

  async def state(request: Request) -> Response:
    return JSONResponse(labelling.state(annotator(request)))

  async def item(request: Request) -> Response:
    return JSONResponse(labelling.item(annotator(request), request.query_params.get("item")))

  async def answer(request: Request) -> Response:
    name = annotator(request)
    message = parse_json(await request.body(), "the request")
    try:
      await labelling.answer(name, message)
    except OSError as error:
      logging.error("an answer is not saved: %s", error)
      raise HTTPException(507, f"the answer is not saved: {error.strerror}") from None
    saved = {"saved": True, "state": labelling.state(name), "next": labelling.item(name)}
    return JSONResponse(saved)

  def image(request: Request) -> Response:  # in a thread of Starlette, because it decodes
    try:
      content = labelling.image(request.path_params["key"])
    except (ValueError, OSError) as error:  # the line names the file, which nobody may see
      logging.error("%s", error)
      raise HTTPException(500, "the image cannot be read; tell who runs this server") from None
    if content is None:
      raise HTTPException(404, "no such image")
    return Response(content, media_type="image/png", headers=_CACHED)

  app = Starlette(
    routes=[
      Route("/", page),
      Route("/static/{file}", page),
      Route("/api/mode", mode),
      Route("/api/state", state),
      Route("/api/item", item),
      Route("/api/answer", answer, methods=["POST"]),
      Route("/image/{key}", image),
    ],
    exception_handlers={ValueError: server.bad_request},
  )
  # A page of another name for this machine has no token, but could give a name.
  hosts = (*server.LOOPBACK, host) if labelling.is_open else ()
  return server.guarded(app, MOST_BYTES, hosts)
