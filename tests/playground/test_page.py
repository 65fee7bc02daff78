"""The page in a browser: paint, fill, compare, download; and what must not happen in it."""

import base64
import io
import json
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="needs the extra label: pip install starlette")
pytest.importorskip("uvicorn", reason="needs the extra label: pip install uvicorn")
pytest.importorskip("playwright", reason="needs playwright: pip install playwright")
import uvicorn
from playwright import sync_api

from prefpaint_jax.playground.app import Playground, make_app
from prefpaint_jax.playground.jobs import Queue
from prefpaint_jax.playground.painter import Painter
from prefpaint_jax.web.server import listening

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TOKEN = "a-token-of-16-or-more"
PHONE, WIDE = (390, 844), (1400, 900)


@pytest.fixture(scope="module")
def playground(quick_compilation):
  return Playground(Painter("mini", baseline="mini", reward="mini"), Queue())


@pytest.fixture(scope="module")
def serving(playground):
  """Returns a function that serves the page and returns its address."""
  servers = []

  def serve(token=None):
    opened = listening("127.0.0.1", 0)
    socket = opened.__enter__()
    server = uvicorn.Server(uvicorn.Config(make_app(playground, token), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    servers.append((server, thread, opened))
    return f"http://127.0.0.1:{socket.getsockname()[1]}"

  yield serve
  for server, thread, opened in servers:
    server.should_exit = True
    thread.join()
    opened.__exit__(None, None, None)


@pytest.fixture(scope="module")
def browser():
  with sync_api.sync_playwright() as player:
    try:
      options = {"executable_path": CHROMIUM} if CHROMIUM else {}
      found = player.chromium.launch(args=["--no-sandbox"], **options)
    except sync_api.Error:
      pytest.skip("needs chromium: playwright install chromium")
    yield found
    found.close()


@pytest.fixture(scope="module")
def address(serving):
  return serving()


@pytest.fixture(params=[WIDE, PHONE], ids=["wide", "phone"])
def page(request, browser, address):
  """A page of each size; it fails for an error in the console and a request to another host."""
  width, height = request.param
  page = browser.new_page(viewport={"width": width, "height": height})
  problems = []
  refused = "Failed to load resource"  # the browser's line about an answer of status 400
  page.on("console", lambda x: x.type == "error" and refused not in x.text and problems.append(x))
  page.on("pageerror", lambda error: problems.append(error))
  page.on("dialog", lambda dialog: problems.append(dialog.message))
  page.on("request", lambda x: x.url.startswith((address, "data:", "blob:")) or problems.append(x))
  page.goto(address)
  page.wait_for_selector("#examples img")
  yield page
  assert not problems, [str(getattr(problem, "text", problem)) for problem in problems]
  assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
  page.close()


def take_example(page, number=0):
  page.locator("#examples button").nth(number).click()
  page.wait_for_selector("#stage", state="visible")


def painted(page):
  """Returns the mask on the canvas, [H, W] of bool."""
  script = """() => {
    const canvas = document.getElementById("mask");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return [canvas.height, canvas.width, Array.from(data).filter((_, i) => i % 4 === 3)];
  }"""
  height, width, alpha = page.evaluate(script)
  return np.array(alpha).reshape(height, width) > 127


def drag(page, *points):
  """Drags the pointer over points of the image in [0, 1]."""
  box = page.locator("#mask").bounding_box()
  places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
  page.mouse.move(*places[0])
  page.mouse.down()
  for place in places[1:]:
    page.mouse.move(*place)
  page.mouse.up()


def fill(page, steps=2):
  page.evaluate(f"document.getElementById('steps').value = {steps}")
  with page.expect_request("**/api/jobs") as sent:
    page.click("#fill")
  page.wait_for_selector("#shown", state="visible", timeout=200_000)
  return json.loads(sent.value.post_data)


def test_example_is_filled_compared_and_downloaded(page, address):
  take_example(page)
  asked = fill(page)
  assert asked["samples"] == 4 and asked["steps"] == 2
  tiles = page.locator(".tile")
  assert tiles.count() == 4 and page.locator(".tile img").count() == 8
  assert page.locator(".best").count() == 2  # of each model
  chosen = page.locator(".tile[aria-pressed=true]")
  assert chosen.locator(".aligned.best").count() == 1
  scores = [float(x.strip("★ ")) for x in page.locator(".aligned .score").all_inner_texts()]
  starred = page.locator(".aligned.best .score").inner_text()
  assert float(starred.strip("★ ")) == max(scores)

  tiles.nth(3).click()
  assert page.inner_text("#which") == "Sample 4 of 4"
  with page.expect_download() as begun:
    page.locator("#downloads a").last.click()
  assert begun.value.suggested_filename == "aligned_seed0_4.png"
  content = Image.open(begun.value.path())
  assert content.size == (32, 32) and content.text["seed"] == "0"
  page.locator("#cut").focus()
  page.keyboard.press("Home")
  assert page.evaluate("document.getElementById('compare').style.getPropertyValue('--cut')") == "0%"
  page.locator("#against [value=original]").check()
  assert page.inner_text("#left_tag") == "Original"


def test_tools_paint_what_is_sent(page, tmp_path):
  Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / "grey.png")
  page.set_input_files("#file", tmp_path / "grey.png")
  page.wait_for_selector("#hint", state="visible")
  assert page.locator("#fill").is_disabled() and page.locator("#undo").is_disabled()
  page.locator("#tool [value=box]").check()
  drag(page, (0.2501, 0.2501), (0.7499, 0.4999))
  box = np.zeros((64, 64), bool)
  box[16:32, 16:48] = True
  np.testing.assert_array_equal(painted(page), box)
  page.locator("#tool [value=brush]").check()
  drag(page, (0.1, 0.9), (0.9, 0.9))
  both = painted(page)
  assert both[box].all() and both[58, 10:55].all() and not both[40].any()
  page.locator("#tool [value=eraser]").check()
  drag(page, (0.5, 0.2), (0.5, 0.55))
  assert not painted(page)[20:30, 32].any() and painted(page)[20, 20]
  page.keyboard.press("Control+z")
  np.testing.assert_array_equal(painted(page), both)
  page.click("#clear")
  assert not painted(page).any() and page.locator("#fill").is_disabled()
  page.click("#undo")
  asked = fill(page)
  sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(asked["mask"]))).convert("RGB"))
  np.testing.assert_array_equal(sent[..., 0] > 127, both)
  assert set(np.unique(sent)) == {0, 255}


def test_large_image_is_painted_small_and_its_mask_sent_whole(page, tmp_path):
  Image.fromarray(np.full((1200, 1800, 3), 90, np.uint8)).save(tmp_path / "large.png")
  page.set_input_files("#file", tmp_path / "large.png")
  page.wait_for_selector("#hint", state="visible")
  size = page.evaluate("(({ width, height }) => [width, height])(document.getElementById('mask'))")
  assert size == [1536, 1024]
  drag(page, (0.4, 0.5), (0.6, 0.5))
  page.locator("#samples [value='1']").check()
  asked = fill(page)
  sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(asked["mask"]))).convert("L"))
  assert sent.shape == (1200, 1800)
  assert sent[600, 720:1080].min() == 255 and sent[:300].max() == 0


def test_errors_are_shown_as_a_line_and_the_page_goes_on(page, tmp_path):
  (tmp_path / "notes.png").write_bytes(b"<script>alert(1)</script>")
  page.set_input_files("#file", tmp_path / "notes.png")
  page.wait_for_selector("#problem", state="visible")
  assert page.inner_text("#problem") == "image: not an image; give a PNG or JPEG"
  take_example(page)
  page.locator("#tool [value=box]").check()
  drag(page, (0.01, 0.01), (0.99, 0.99))
  assert painted(page).all()
  page.click("#fill")
  page.wait_for_selector("#problem", state="visible")
  assert page.inner_text("#problem").startswith("mask: the mask is full")
  page.click("#undo")
  page.fill("#text", "<img src=x onerror=alert(1)><script>alert(2)</script>")
  fill(page)
  assert page.locator("#problem").is_hidden()
  assert page.locator("img[src=x]").count() == 0


def test_job_is_cancelled_and_the_image_can_be_filled_again(page, playground):
  queue, released = playground._queue, threading.Event()
  queue.add(lambda job: released.wait(60))
  take_example(page, 1)
  page.click("#fill")
  page.wait_for_selector("text=One fill before yours")
  page.click("#cancel")
  page.wait_for_selector("#fill", state="visible")
  released.set()
  assert page.locator("#shown").is_hidden() and page.locator("#problem").is_hidden()
  fill(page)


def test_link_carries_the_token_which_no_request_names(browser, serving):
  address = serving(TOKEN)
  page = browser.new_page()
  seen = []
  page.on("request", lambda request: seen.append(request.url))
  page.goto(f"{address}/#wrong-token-of-16-or-more")
  page.wait_for_selector("#problem", state="visible")
  assert "token" in page.inner_text("#problem") and page.locator("#start").is_hidden()
  page.goto("about:blank")
  page.goto(f"{address}/#{TOKEN}")
  page.wait_for_selector("#examples img")
  deadline = time.monotonic() + 20
  while not page.evaluate("document.querySelector('#examples img').naturalWidth"):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  take_example(page)
  fill(page)
  assert not any(TOKEN in url.partition("#")[0] for url in seen)
  page.close()
