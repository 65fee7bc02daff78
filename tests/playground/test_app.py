"""The web application: results equal those of `inpaint`, and attacks get one line."""

import base64
import io
import json
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

pytest.importorskip("starlette", reason="needs the extra label: pip install starlette")
pytest.importorskip("httpx", reason="needs httpx: pip install httpx")
from starlette.testclient import TestClient

from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.models.architectures import tiny_configs
from prefpaint_jax.models.assembly import make_modules
from prefpaint_jax.playground import app, painter
from prefpaint_jax.playground.jobs import Queue
from prefpaint_jax.playground.painter import Painter

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-16-or-more"
ADDRESS = "http://127.0.0.1:8001"


def png(array, format="PNG", **options):
  file = io.BytesIO()
  Image.fromarray(array).save(file, format, **options)
  return file.getvalue()


def photo(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def hole(height, width):
  mask = np.zeros((height, width), np.uint8)
  mask[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = 255
  return mask


def text_of(content):
  return base64.b64encode(content).decode()


@pytest.fixture(scope="module")
def models(quick_compilation):
  return Painter("mini", baseline="mini", reward="mini")


@pytest.fixture(scope="module")
def client(models):
  playground = app.Playground(models, Queue())
  return TestClient(app.make_app(playground, None), base_url=ADDRESS)


def upload(client, content):
  kind = {"content-type": "application/octet-stream"}
  answer = client.post("/api/images", content=content, headers=kind)
  assert answer.status_code == 200, answer.text
  return answer.json()


def start(client, image, mask, **settings):
  asked = {"image": image, "mask": text_of(mask), "steps": 2, "samples": 1} | settings
  answer = client.post("/api/jobs", json=asked)
  assert answer.status_code == 200, answer.text
  return answer.json()["job"]


def finish(client, job, seconds=200):
  deadline = time.monotonic() + seconds
  while (state := client.get(f"/api/jobs/{job}").json())["state"] in ("waiting", "running"):
    assert time.monotonic() < deadline, state
    time.sleep(0.02)
  return state


# ----------------------------------------------------------------------------------------- results
@pytest.mark.slow
def test_ten_jobs_at_once_get_the_samples_of_their_own_seeds_images_and_masks(client, models):
  images = [photo(32, 32, seed) for seed in range(10)]
  keys = [upload(client, png(image))["image"] for image in images]
  masks = [png(np.roll(hole(32, 32), seed, axis=0)) for seed in range(10)]
  jobs = [start(client, key, masks[i], seed=i) for i, key in enumerate(keys)]
  bad = start(client, keys[0], png(np.zeros((32, 32), np.uint8)))
  last = start(client, keys[0], masks[0], seed=0)
  cancelled = start(client, keys[0], masks[0])
  assert client.delete(f"/api/jobs/{cancelled}").json()["state"] == "cancelled"
  states = [finish(client, job) for job in jobs]
  assert {state["state"] for state in states} == {"done"}, states
  failed = finish(client, bad)
  assert failed["state"] == "failed" and failed["error"].startswith("mask: the mask is empty")
  shown = []
  for state, image, mask in zip(states, images, masks, strict=True):
    aligned, base = state["result"]["policies"]
    assert (aligned["label"], base["label"], aligned["best"]) == ("aligned", "base", 0)
    samples = [client.get(f"/images/{one['files'][0]}").content for one in (aligned, base)]
    assert samples[0] == samples[1]  # one model with itself, from the same seed
    shown.append(np.asarray(Image.open(io.BytesIO(samples[0]))))
    known = np.asarray(Image.open(io.BytesIO(mask))) == 0
    np.testing.assert_array_equal(shown[-1][known], image[known])
  assert len({one.tobytes() for one in shown}) == 10
  again = finish(client, last)["result"]["policies"][0]["files"][0]
  assert client.get(f"/images/{again}").content == (
    client.get(f"/images/{states[0]['result']['policies'][0]['files'][0]}").content
  )


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 32), (60, 90)])
def test_files_equal_those_of_the_inpaint_command(quick_compilation, tmp_path, size):
  """Byte for byte."""
  (tmp_path / "image.png").write_bytes(png(photo(*size)))
  (tmp_path / "mask.png").write_bytes(png(hole(*size)))
  subprocess.run(
    [sys.executable, "-m", "prefpaint_jax.inpaint", "--image=image.png", "--mask=mask.png"]
    + ["--output=out.png", "--num_samples=3", "--num_steps=7", "--seed=5", "--text=a dog"]
    + (["--reward=mini"] if size == (32, 32) else []),  # scores are of the working size
    cwd=tmp_path,
    check=True,
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
  )
  models = Painter("mini", reward="mini" if size == (32, 32) else None)
  client = TestClient(app.make_app(app.Playground(models, Queue()), None), base_url=ADDRESS)
  sent = upload(client, (tmp_path / "image.png").read_bytes())
  assert (sent["height"], sent["width"]) == size  # nothing is cut
  mask = (tmp_path / "mask.png").read_bytes()
  job = start(client, sent["image"], mask, samples=3, steps=7, seed=5, text="a dog")
  (result,) = finish(client, job)["result"]["policies"]
  for i, key in enumerate(result["files"]):
    assert client.get(f"/images/{key}").content == (tmp_path / f"out_{i}.png").read_bytes()


# ------------------------------------------------------------------------------------------ images
def test_few_working_sizes_serve_all_images_and_little_is_cut(models):
  main = models.policies["aligned"]
  rng, works = np.random.default_rng(0), set()
  for height, width in rng.integers(1, 4097, (400, 2)):
    rows, columns = models.choose_part((height, width))
    part = rows.stop - rows.start, columns.stop - columns.start
    assert 0 <= rows.start < rows.stop <= height and 0 <= columns.start < columns.stop <= width
    works.add(main.working_size(*part))
    ratio, shorter = max(height, width) / min(height, width), min(height, width)
    if ratio <= 2 and shorter > 64:
      assert np.prod(part) > 0.92 * height * width
  assert len(works) <= 2 * 9 - 1


def test_image_of_a_common_ratio_is_whole_and_a_panorama_is_cut_in_its_middle(client):
  sent = upload(client, png(photo(40, 60)))
  assert (sent["width"], sent["height"], sent["full"]) == (60, 40, [60, 40])
  assert sent["works"] == [48, 32]
  image = photo(20, 100)
  sent = upload(client, png(image))
  assert (sent["width"], sent["height"], sent["full"]) == (40, 20, [100, 20])
  shown = Image.open(io.BytesIO(client.get(f"/images/{sent['image']}").content))
  np.testing.assert_array_equal(np.asarray(shown), image[:, 30:70])


def test_large_images_are_shown_small_and_kept_whole(client, models, monkeypatch):
  monkeypatch.setattr(painter, "MOST_SHOWN", 48)
  sent = upload(client, png(photo(64, 96)))
  assert (sent["width"], sent["height"]) == (96, 64)
  content = client.get(f"/images/{sent['image']}").content
  assert Image.open(io.BytesIO(content)).size == (48, 32)


def test_examples_are_the_prompts_of_the_mini_world_with_their_masks(client):
  state = client.get("/api/state").json()
  assert state["policies"] == {"aligned": "mini", "base": "mini"} and state["texts"]
  assert len(state["examples"]) == 8
  for example in state["examples"]:
    image, mask = (client.get(f"/images/{example[name]}").content for name in ("image", "mask"))
    assert Image.open(io.BytesIO(image)).size == (32, 32)
    assert len(np.unique(np.asarray(Image.open(io.BytesIO(mask))))) == 2


def test_model_of_another_size_gets_photographs_as_examples(monkeypatch):
  inpainter = Inpainter(make_modules(tiny_configs()), {}, {}, {})
  monkeypatch.setattr(painter, "open_policy", lambda name, step=None: inpainter)
  examples = list(Painter("tiny").examples(2))
  assert [upload.full for upload, _ in examples] == [(341, 512), (288, 512)]
  assert [mask for _, mask in examples] == [None, None]


@pytest.mark.parametrize(
  ("model", "baseline", "opened"),
  [
    ("run", None, {"aligned": ("run", None), "base": ("first", 7)}),
    ("run", "other", {"aligned": ("run", None), "base": ("other", None)}),
    ("first", None, {"model": ("first", None)}),
    ("first", "other", {"aligned": ("first", None), "base": ("other", None)}),
  ],
)
def test_baseline_of_a_run_is_the_checkpoint_that_it_began_with(
  monkeypatch, model, baseline, opened
):
  config = ConfigDict({"policy": "first"})
  monkeypatch.setattr(painter, "open_run", lambda name: (config, None) if name == "run" else None)
  monkeypatch.setattr(painter, "pinned_step", {"run": 7}.get)
  monkeypatch.setattr(painter, "open_policy", lambda name, step=None: (name, step))
  models = Painter(model, baseline)
  assert models.policies == opened
  assert models.names == {label: name for label, (name, _) in opened.items()}


# ----------------------------------------------------------------------------------------- attacks
def bomb():
  """Returns a PNG of 30000 x 30000 pixels in 1 MB."""

  def chunk(kind, data):
    return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

  header = (30000).to_bytes(4) * 2 + bytes([8, 0, 0, 0, 0])
  pixels = chunk(b"IDAT", zlib.compress(bytes(10**6)))
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
  ("content", "kind", "status", "line"),
  [
    (b"<script>alert(1)</script>", "image/png", 400, "image: not an image; give a PNG or JPEG"),
    (b"", "image/png", 400, "image: not an image"),
    (bomb(), "image/png", 400, "image: 30000x30000 pixels; expected at most 4096 a side"),
    (POSTSCRIPT, "image/png", 400, "image: the format is EPS; expected PNG, JPEG"),
    (png(photo(9, 9))[:-40], "image/png", 400, "image: the image is truncated or damaged"),
    (png(photo(9, 9)), "text/html", 415, "the content type is 'text/html'; expected an image"),
    (b"x" * (20 * 2**20 + 1), "image/png", 413, "expected at most 20971520"),
  ],
  ids=["script", "empty", "bomb", "eps", "truncated", "type", "huge"],
)
def test_what_is_no_small_image_is_refused_in_one_line(client, content, kind, status, line):
  answer = client.post("/api/images", content=content, headers={"content-type": kind})
  assert answer.status_code == status and line in answer.text, answer.text
  assert "\n" not in answer.text and answer.headers["content-type"].startswith("text/plain")


@pytest.fixture(scope="module")
def known(client):
  return upload(client, png(photo(32, 32)))["image"]


MASK = text_of(png(hole(32, 32)))


@pytest.mark.parametrize(
  ("change", "status", "line"),
  [
    ({"image": "../../etc/passwd"}, 404, "the image is no longer on the server"),
    ({"image": ["a"]}, 404, "the image is no longer on the server"),
    ({"mask": "no base64!"}, 400, "mask: expected a PNG in base64"),
    ({"mask": 7}, 400, "mask: expected a PNG in base64"),
    ({"steps": 0}, 400, "steps is '0'; expected an integer from 1 to 200"),
    ({"steps": True}, 400, "steps is 'True'; expected an integer"),
    ({"steps": 1e3}, 400, "steps is '1000.0'; expected an integer"),
    ({"samples": 9}, 400, "samples is '9'; expected an integer from 1 to 8"),
    ({"samples": None}, 400, "samples is 'None'; expected an integer"),
    ({"seed": -1}, 400, "seed is '-1'; expected an integer from 0 to 4294967295"),
    ({"text": "x" * 1001}, 400, "text: expected a text of at most 1000 characters"),
    ({"text": ["x"]}, 400, "text: expected a text"),
    ({"text": "\ud800"}, 400, "text: expected a text"),
    ({"model": "other"}, 400, "model: no such field; expected some of steps, samples, seed, text"),
  ],
)
def test_wrong_job_is_refused_in_one_line(client, known, change, status, line):
  asked = json.dumps({"image": known, "mask": MASK} | change)
  answer = client.post("/api/jobs", content=asked, headers={"content-type": "application/json"})
  assert answer.status_code == status and line in answer.text, answer.text
  assert "\n" not in answer.text


@pytest.mark.parametrize("body", [b"{", b"[]", b"7", b"\xff", b"[" * 10**5])
def test_what_is_no_object_is_refused_in_one_line(client, body):
  answer = client.post("/api/jobs", content=body, headers={"content-type": "application/json"})
  assert answer.status_code == 400 and "no JSON" in answer.text and "\n" not in answer.text
  answer = client.post("/api/jobs", content=body, headers={"content-type": "text/plain"})
  assert answer.status_code == 415


@pytest.mark.parametrize(
  ("mask", "line"),
  [
    (png(hole(9, 9)), "mask: PNG of 9x9 pixels; expected a PNG of 32x32"),
    (bomb(), "mask: PNG of 30000x30000 pixels; expected"),
    (png(hole(32, 32), "BMP"), "mask: BMP of 32x32 pixels; expected a PNG"),
    (b"", "mask: not an image"),
    (png(np.full((32, 32), 255, np.uint8)), "mask: the mask is full"),
  ],
  ids=["size", "bomb", "format", "nothing", "full"],
)
def test_wrong_mask_fails_in_one_line(client, known, mask, line):
  state = finish(client, start(client, known, mask))
  assert state["state"] == "failed" and state["error"].startswith(line), state["error"]


@pytest.mark.parametrize(
  "path",
  [
    "/static/../app.py",
    "/static/..%2fapp.py",
    "/static/%2e%2e%2f%2e%2e%2fsetup.cfg",
    "/static//etc/passwd",
    "/static/app.py",
    "/images/..%2f..%2fsetup.cfg",
    "/images/foreign",
    "/api/jobs/foreign",
  ],
)
def test_foreign_paths_and_ids_find_nothing(client, path):
  answer = client.get(path)
  assert answer.status_code == 404 and "import" not in answer.text
  if path.startswith("/api"):
    assert client.delete(path).status_code == 404


def test_answers_have_the_types_and_headers_that_keep_scripts_out(client, known):
  for path, kind in (("/", "text/html"), ("/static/demo.js", "text/javascript")):
    answer = client.get(path)
    assert answer.headers["content-type"].startswith(kind)
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy
  assert client.get(f"/images/{known}").headers["content-type"] == "image/png"


def test_every_call_needs_the_token_before_its_body_is_read(models):
  playground = app.Playground(models, Queue())
  client = TestClient(app.make_app(playground, TOKEN, hosts=()), base_url="http://example.org")
  assert client.get("/").status_code == 200
  right = {"authorization": f"Bearer {TOKEN}"}
  assert client.get("/api/state", headers=right).status_code == 200
  for wrong in ({}, {"authorization": "Bearer other"}, {"authorization": TOKEN}):
    for method, path in (("GET", "state"), ("POST", "images"), ("POST", "jobs"), ("GET", "jobs/x")):
      answer = client.request(method, f"/api/{path}", headers=wrong)
      assert answer.status_code == 401 and "token" in answer.text and "\n" not in answer.text
      assert answer.headers["x-content-type-options"] == "nosniff"
  huge = client.post("/api/images", content=iter([b"x" * 2**20] * 40))
  assert huge.status_code == 401


@pytest.mark.parametrize(
  ("host", "token", "line"),
  [
    ("0.0.0.0", None, r"--host=0.0.0.0 is reached from other machines; give --token=[\w-]{16,}"),
    ("127.0.0.1", "short", "--token has 5 characters; expected 16 to 200 of A-Z a-z 0-9 - _"),
    ("0.0.0.0", "a token with spaces", "--token has 19 characters; expected 16 to 200 of"),
  ],
)
def test_unsafe_server_is_refused_in_one_line(host, token, line):
  with pytest.raises(ValueError, match=rf"\A{line}.*\Z"):
    app.check_access(host, token)
  app.check_access("127.0.0.1", None)
  app.check_access("0.0.0.0", TOKEN)
