"""The page of labelling in a browser, with the server: nothing lost or double, by keys and taps."""

import contextlib
import re
import shutil

import numpy as np
import pytest
from labelling_world import label_server, read_lines, write_candidates
from PIL import Image

pytest.importorskip("starlette", reason="needs the extra label: pip install starlette")
pytest.importorskip("uvicorn", reason="needs the extra label: pip install uvicorn")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(CHROMIUM is None, reason=f"needs one of {', '.join(NAMES)}"),
]
CRITERIA = ("structure", "texture", "overall")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
# The first row of pixels of each candidate on the page, in their order.
FIRST_ROWS = """() => [...document.querySelectorAll(".card img.candidate")].map((image) => {
  const canvas = Object.assign(document.createElement("canvas"), {width: 8, height: 8});
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return [...context.getImageData(0, 0, 8, 1).data].filter((_, i) => i % 4 < 3);
})"""


@pytest.fixture(scope="module")
def browser():
  with playwright.sync_playwright() as engine:
    opened = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield opened
    opened.close()


class Annotator:
  """A person at a browser, who knows the candidates by their pixels."""

  def __init__(self, browser, folder, **options):
    self.page = browser.new_context(**options).new_page()
    self.page.set_default_timeout(60_000)
    self.errors, self.requests = [], []
    self.page.on("pageerror", lambda error: self.errors.append(str(error)))
    self.page.on("dialog", lambda dialog: self.errors.append(dialog.message))
    self.page.on("console", self._hear)
    self.page.on("request", lambda request: self.requests.append(request.url))
    self.names = {}
    for file in (folder / "inpaint").iterdir():
      self.names[np.asarray(Image.open(file))[0].tobytes()] = file.stem

  def _hear(self, message):
    if message.type in ("error", "warning"):
      self.errors.append(message.text)

  def enter(self, root, name):
    self.root, self.name = root, name
    self.page.goto(root)
    self.page.fill("#given", name)
    self.press("Enter")
    self.wait()

  def press(self, *keys):
    for key in keys:
      self.page.keyboard.press(key)

  def wait(self):
    """Until the server has answered."""
    self.page.wait_for_selector("main:not([aria-busy])", state="attached")

  def view(self):
    return self.page.evaluate("document.body.dataset.view")

  def candidates(self):
    """Returns the names of the candidates on the page."""
    return [self.names[bytes(row)] for row in self.page.evaluate(FIRST_ROWS)]

  def scores(self):
    """Returns this person's score for each scale, in their order."""
    return [taste(self.name, x, criterion) for x in self.candidates() for criterion in CRITERIA]

  def type_scores(self, shift=0):
    self.press(*(str((score + shift) % 8) for score in self.scores()))

  def answer(self, shift=0):
    self.type_scores(shift)
    self.press("Enter")

  def check(self):
    """No error, and no request to another server."""
    assert not self.errors
    others = [x for x in self.requests if not x.startswith((self.root, "blob:", "data:image/"))]
    assert not others


def taste(annotator, candidate, criterion):
  """Returns the score from 0 to 7 that an annotator gives."""
  _, prompt, k = candidate.split("_")
  return (3 * int(prompt) + 5 * int(k) + CRITERIA.index(criterion) + len(annotator)) % 8


def restarted(folder, root, *flags):
  """Runs the server again on its port."""
  port = re.search(r":(\d+)/", root)[1]
  return label_server(folder, f"--port={port}", *flags)


def test_two_people_score_by_keys_and_nothing_is_lost_or_double(browser, tmp_path):
  """With corrections, a reload, and a server that is killed and comes back."""
  folder = write_candidates(tmp_path / "candidates", 20, text="<script>document.title = 1</script>")
  people = [Annotator(browser, folder) for _ in range(2)]
  names = ["<img src=x onerror=alert(1)>", "Ann"]
  with contextlib.ExitStack() as servers:
    process, (root,) = servers.enter_context(label_server(folder, "--port=0"))
    for person, name in zip(people, names, strict=True):
      person.enter(root, name)
      assert person.page.inner_text("#who") == name
    for number in range(100):
      open_ones = [person for person in people if person.view() == "item"]
      if not open_ones:
        break
      for person in open_ones:
        if number == 3:  # wrong scores, corrected
          person.answer(shift=1)
          person.wait()
          person.press("u")
          person.wait()
          assert person.page.locator("[aria-checked=true]").count() == 9
        if number == 6:  # a reload between two scores
          first, *rest = [str(score) for score in person.scores()]
          person.press(first, rest[0])
          person.page.reload()
          person.wait()
          assert person.page.locator("[aria-checked=true]").count() == 2
          person.press(*rest[1:], "Enter")
          person.wait()
          continue
        if number == 9 and person is people[0]:
          people[1].type_scores()
          process.kill()
          process.wait()
          person.answer()
          people[1].press("Enter")
          for waiting in people:
            waiting.page.wait_for_selector("#notice:has-text('kept and will be sent again')")
          people[1].page.wait_for_timeout(1000)
          process, _ = servers.enter_context(restarted(folder, root))
          for waiting in people:
            waiting.wait()
            assert waiting.page.is_hidden("#notice")
            assert any("CONNECTION_REFUSED" in error for error in waiting.errors)
            waiting.errors.clear()
          break
        person.answer()
        person.wait()
    for person in people:
      assert person.page.inner_text("h1:visible") == f"Thank you, {person.name}."
      assert person.page.title() == "Score inpaintings"
      person.check()
  check_scores(folder, names)


def check_scores(folder, names):
  lines = read_lines(folder / "annotations.jsonl")
  first = [x for x in lines if not x.get("repeat") and not x.get("corrects")]
  given = [(x["annotator"], x["candidate"]) for x in first]
  assert len(set(given)) == len(given) == 2 * 20 * 3
  assert {annotator for annotator, _ in given} == set(names)
  corrected = [x for x in lines if x.get("corrects") and not x.get("repeat")]
  assert len(corrected) == 2 * 3
  last = {(x["annotator"], x["candidate"]): x for x in first + corrected}
  for (annotator, candidate), line in last.items():
    for criterion in CRITERIA:
      assert line[criterion] == taste(annotator, candidate, criterion)


def test_answer_whose_acknowledgement_is_lost_is_saved_once(browser, tmp_path):
  """Also when the page is loaded again before the next attempt."""
  folder = write_candidates(tmp_path / "candidates", 2)
  person = Annotator(browser, folder)
  page = person.page

  def lose(route):
    route.fetch()
    route.abort()

  with label_server(folder, "--port=0", "--repeats=0") as (_, (root,)):
    person.enter(root, "Ann")
    page.route("**/api/answer", lose)
    person.answer()
    page.wait_for_selector("#notice:has-text('kept and will be sent again')")
    page.reload()
    page.wait_for_selector("#notice:has-text('kept and will be sent again')")
    page.unroute("**/api/answer", lose)
    person.wait()
    assert page.inner_text("#place").startswith("2 of 2")
    assert page.is_hidden("#notice")
  assert len(read_lines(folder / "annotations.jsonl")) == 3


def test_image_that_fails_to_load_ahead_is_told_with_its_item_and_asked_again(browser, tmp_path):
  folder = write_candidates(tmp_path / "candidates", 2)
  person = Annotator(browser, folder)
  page, shown = person.page, []

  def fail(route):
    """Answers the images of the first item, and no other."""
    if len(shown) < 5:
      shown.append(route.request.url)
      return route.continue_()
    return route.fulfill(status=500, body="the image cannot be read")

  with label_server(folder, "--port=0", "--repeats=0") as (_, (root,)):
    page.route("**/image/*", fail)
    person.enter(root, "Ann")
    assert page.is_hidden("#notice")
    person.answer()
    page.wait_for_selector("#notice:has-text('the image cannot be read')")
    page.unroute("**/image/*", fail)
    person.wait()
    assert page.inner_text("#place").startswith("2 of 2")
    assert page.is_hidden("#notice")


def test_pairs_are_compared_by_arrows(browser, tmp_path):
  """With a correction, and with an equal pair."""
  folder = write_candidates(tmp_path / "candidates", 4)
  person = Annotator(browser, folder)
  equal = {"image_1_0", "image_1_2"}
  with label_server(folder, "--port=0", "--mode=pairs", "--repeats=0") as (_, (root,)):
    person.enter(root, "Ann")
    for number in range(12):
      left, right = person.candidates()
      key = "ArrowLeft" if left > right else "ArrowRight"
      if {left, right} == equal:
        key = "ArrowDown"
      if number == 5:
        person.press("=")
        person.wait()
        person.press("Backspace")
        person.wait()
        assert person.page.get_attribute("#submit", "class") == "main chosen"
        assert person.candidates() == [left, right]
      person.press(key)
      person.wait()
    assert person.view() == "done"
    person.check()
  last = {tuple(line["candidates"]): line for line in read_lines(folder / "pairs.jsonl")}
  assert len(last) == 12
  assert sum(line.get("corrects", False) for line in read_lines(folder / "pairs.jsonl")) == 1
  for pair, line in last.items():
    assert line["better"] == (None if set(pair) == equal else max(pair))


def test_page_works_by_taps_on_a_phone(browser, tmp_path):
  """Nothing is wider than the screen, nothing moves, and a tap leads to the next empty scale."""
  folder = write_candidates(tmp_path / "candidates", 3, text="a long text " * 100)
  person = Annotator(browser, folder, **PHONE)
  page = person.page
  page.add_init_script("""
    window.shift = 0;
    new PerformanceObserver((list) => {
      for (const entry of list.getEntries()) window.shift += entry.value;
    }).observe({type: "layout-shift", buffered: true});
  """)
  with label_server(folder, "--port=0", "--repeats=0") as (_, (root,)):
    person.enter(root, "Ann")
    for number in range(3):
      assert page.evaluate("document.documentElement.scrollWidth") == 390
      assert page.evaluate("document.documentElement.scrollHeight") == 844
      small = "(e) => Math.min(e.offsetWidth, e.offsetHeight)"
      assert all(button.evaluate(small) >= 40 for button in page.locator(".scale button").all())
      for index, score in enumerate(person.scores()):
        scale = page.locator(".scale").nth(index)
        playwright.expect(scale).to_be_in_viewport(ratio=0.99)
        scale.locator("button").nth(score).tap()
      if number == 0:
        pinch(page)
        assert page.evaluate("visualViewport.scale") == 1
        zoomed = page.locator(".zoomed .frame")
        assert zoomed.count() == 4
        page.locator("#zoom").tap()
        assert zoomed.count() == 0
      page.locator("#help").tap()
      assert page.evaluate("document.querySelector('dialog').scrollWidth") == 390
      page.locator("#close").tap()
      person.requests.clear()
      page.locator("#submit").tap()
      person.wait()
      if number == 1:  # the images of the last item are there already
        assert person.requests == [f"{root}api/answer"]
    assert person.view() == "done"
    assert page.evaluate("window.shift") < 0.01
    person.check()
  for line in read_lines(folder / "annotations.jsonl"):
    for criterion in CRITERIA:
      assert line[criterion] == taste("Ann", line["candidate"], criterion)


def pinch(page):
  """Moves two fingers apart on the image."""
  devices = page.context.new_cdp_session(page)
  for kind, apart in (("touchStart", 40), ("touchMove", 80), ("touchMove", 120), ("touchEnd", 0)):
    points = [{"x": 195 + side * apart, "y": 350, "id": side + 1} for side in (-1, 1) if apart]
    devices.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


def test_images_are_compared_in_step(browser, tmp_path):
  """Zoom, the incomplete image, and the guidelines, all by keys."""
  folder = write_candidates(tmp_path / "candidates", 1)
  person = Annotator(browser, folder)
  page = person.page
  moved = "[...document.querySelectorAll('.view')].map((x) => getComputedStyle(x).transform)"
  with label_server(folder, "--port=0") as (_, (root,)):
    person.enter(root, "Ann")
    page.wait_for_function("document.querySelectorAll('.card').length == 3")
    whole = page.evaluate(moved)
    seen = [whole[0]]
    for key in ("z", "ArrowRight", "+", "-"):
      person.press(key)
      now = page.evaluate(moved)
      assert len(now) == 4 and len(set(now)) == len({x[:30] for x in now}) == 1
      assert now[0] != seen[-1]
      seen.append(now[0])
    person.press("Escape")
    assert page.evaluate(moved) == whole
    known = page.locator(".card .known").first
    for visible in (True, False):
      person.press("t")
      assert known.evaluate("(x) => getComputedStyle(x).visibility == 'visible'") == visible
    person.press("?", "5")
    assert page.is_visible("#guidelines")
    person.press("Escape")
    assert page.is_hidden("#guidelines") and page.locator("[aria-checked=true]").count() == 0
    person.press("5", "ArrowRight", "4", "ArrowLeft", "ArrowUp", "3")
    chosen = page.locator("[aria-checked=true]").all()
    labels = [x.evaluate("(x) => x.parentElement.ariaLabel + ' ' + x.ariaLabel") for x in chosen]
    assert labels == [
      "Candidate A, structure Structure 5",
      "Candidate A, texture Texture 3",
      "Candidate B, texture Texture 4",
    ]
    person.check()


def test_invitation_links_open_the_page_and_wrong_ones_are_told(browser, tmp_path):
  folder = write_candidates(tmp_path / "candidates", 1)
  people = tmp_path / "people.txt"
  people.write_text("Ann first-token-of-this-test\nBob other-token-of-this-test\n")
  flags = ("--port=0", f"--annotators={people}", "--per_prompt=1")
  with label_server(folder, *flags) as (_, lines):
    links = dict(line.split(": ", 1) for line in lines)
    person = Annotator(browser, folder)
    page = person.page
    person.root = links["Ann"].split("#")[0]
    page.goto(person.root + "#wrong")
    page.wait_for_selector("#refusal:has-text('invitation')")
    assert any("401" in error for error in person.errors)
    person.errors.clear()
    page.fill("#given", links["Ann"])
    person.press("Enter")
    page.wait_for_selector("#who:has-text('Ann')")
    person.press("7")
    page.goto(links["Bob"])
    page.wait_for_selector("#who:has-text('Bob')")
    assert page.url == person.root
    assert page.locator("[aria-checked=true]").count() == 0
    person.check()
