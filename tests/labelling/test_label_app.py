"""The server of labelling: what it answers and refuses, a killed server, many annotators."""

import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from labelling_world import ROOT, label_server, read_lines, write_candidates
from PIL import Image

from prefpaint_jax.labelling.app import make_app
from prefpaint_jax.labelling.session import Labelling

pytest.importorskip("starlette", reason="needs the extra label: pip install starlette")
httpx = pytest.importorskip("httpx", reason="needs httpx: pip install httpx")
from starlette.testclient import TestClient  # noqa: E402

ANN, BOB = {"authorization": "Bearer token-of-ann"}, {"authorization": "bearer token-of-bob"}
INVITED = {"token-of-ann": "ann", "token-of-bob": "bob", "token-of-eve": "eve"}
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
  return write_candidates(tmp_path_factory.mktemp("label") / "candidates", 6, text=SCRIPT)


@pytest.fixture
def folder(candidates):
  yield candidates
  for name in ("annotations.jsonl", "pairs.jsonl"):
    (candidates / name).unlink(missing_ok=True)


def client_of(folder, headers=None, **options) -> TestClient:
  app = make_app(Labelling(folder, **options))
  client = TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)
  client.headers.update(headers or {})
  return client


@pytest.fixture
def client(folder):
  return client_of(folder, ANN, invited=INVITED, per_prompt=2, repeats=0.0)


def answer_to(item: dict, score: int = 3, **changes) -> dict:
  criteria = dict.fromkeys(("structure", "texture", "overall"), score)
  scores = {candidate["id"]: criteria for candidate in item["candidates"]}
  return {"item": item["item"], "seconds": 1.5, "scores": scores} | changes


def pixels(client, url: str) -> np.ndarray:
  answer = client.get(url, headers={"authorization": ""})  # an <img> sends no header
  assert answer.headers["content-type"] == "image/png"
  return np.asarray(Image.open(io.BytesIO(answer.content)))


# ------------------------------------------------------------------------------------------ items


def test_item_shows_the_images_and_tells_no_name(client, folder):
  item = client.get("/api/item").json()
  assert item["text"] == SCRIPT and item["number"] == 1 and item["previous"] is None
  stored = {x.read_bytes(): x.stem for x in (folder / "inpaint").glob("*.png")}
  shown = {np.asarray(Image.open(io.BytesIO(x))).tobytes(): name for x, name in stored.items()}
  names = [shown[pixels(client, x["image"]).tobytes()] for x in item["candidates"]]
  image_id = names[0].rpartition("_")[0]
  assert sorted(names) == [f"{image_id}_{k}" for k in range(3)]
  mask = pixels(client, item["mask"])
  known = pixels(client, item["known"])
  whole = np.asarray(Image.open(folder / "images" / f"{image_id}.png"))
  assert np.array_equal(mask, np.asarray(Image.open(folder / "masks/image_0_mask.png"))[..., 0])
  assert np.array_equal(known[..., 3] == 0, mask > 0) and not known[mask > 0].any()
  assert np.array_equal(known[mask == 0][:, :3], whole[mask == 0])
  assert not re.search(
    r"image_\d|policy|noise|png|candidates/", json.dumps(item).replace(SCRIPT, "")
  )


def test_order_of_candidates_is_random_and_stable(folder):
  places = Counter()
  for name in map("ann{}".format, range(40)):
    client = client_of(folder, {"x-annotator": name}, per_prompt=100)
    item = client.get("/api/item").json()
    assert client.get("/api/item").json() == item
    names = [x["id"] for x in item["candidates"]]
    places[item["known"], names.index(min(names))] += 1
  by_place = Counter(place for _, place in places.elements())
  assert min(by_place[place] for place in range(3)) >= 5  # of 40; 13 expected


def test_images_of_the_next_item_are_told_ahead(folder):
  client = client_of(folder, {"x-annotator": "ann"}, repeats=0.0)
  item = client.get("/api/item").json()
  for _ in range(5):
    ahead = item["ahead"]
    item = client.post("/api/answer", json=answer_to(item)).json()["next"]
    images = [x["image"] for x in item["candidates"]]
    assert ahead == [item["known"], item["mask"], *images]
  assert item["ahead"] == []


def test_answer_is_saved_once_and_can_be_corrected(client, folder):
  first = client.get("/api/item").json()
  saved = client.post("/api/answer", json=answer_to(first)).json()
  assert saved["saved"] and saved["state"]["done"] == 1 and saved["next"]["number"] == 2
  assert saved["next"]["previous"] == first["item"]
  assert saved["state"]["seconds_left"] == 1.5 * (saved["state"]["total"] - 1)
  assert client.post("/api/answer", json=answer_to(first)).json() == saved  # a retry
  rows = read_lines(folder / "annotations.jsonl")
  assert len(rows) == 3 and {row["annotator"] for row in rows} == {"ann"}
  again = client.get("/api/item", params={"item": first["item"]}).json()
  assert again == first | {"answer": {"scores": answer_to(first)["scores"]}}
  corrected = client.post("/api/answer", json=answer_to(first, score=7)).json()
  assert corrected == saved
  rows = read_lines(folder / "annotations.jsonl")[3:]
  assert [(row["overall"], row["corrects"]) for row in rows] == [(7, True)] * 3


def test_scores_belong_to_the_candidates_that_were_shown(client, folder):
  item = client.get("/api/item").json()
  shown = {
    pixels(client, x["image"]).tobytes(): score for score, x in enumerate(item["candidates"])
  }
  given = answer_to(item)
  for score, candidate in enumerate(item["candidates"]):
    given["scores"][candidate["id"]] = {"structure": score, "texture": 6, "overall": 7 - score}
  client.post("/api/answer", json=given)
  for row in read_lines(folder / "annotations.jsonl"):
    image = np.asarray(Image.open(folder / "inpaint" / f"{row['candidate']}.png"))
    score = shown[image.tobytes()]
    assert (row["structure"], row["texture"], row["overall"]) == (score, 6, 7 - score)


def test_pairs_are_saved_with_the_better_candidate(folder):
  client = client_of(folder, {"x-annotator": "Ann%20B"}, mode="pairs", per_prompt=1, repeats=0.0)
  item = client.get("/api/item").json()
  assert client.get("/api/state").json()["total"] == 6 * 3  # each two of three
  images = [pixels(client, candidate["image"]).tobytes() for candidate in item["candidates"]]
  better = item["candidates"][1]["id"]
  message = {"item": item["item"], "seconds": 2, "better": better}
  next_ = client.post("/api/answer", json=message).json()["next"]
  client.post("/api/answer", json={"item": next_["item"], "seconds": 2, "better": None})
  first, second = read_lines(folder / "pairs.jsonl")
  chosen = np.asarray(Image.open(folder / "inpaint" / f"{first['better']}.png")).tobytes()
  assert images.index(chosen) == 1 and second["better"] is None
  assert first["left"] != first["better"]
  assert first["annotator"] == "Ann B" and first["candidates"] == sorted(first["candidates"])
  again = client.get("/api/item", params={"item": item["item"]}).json()
  assert again["answer"] == {"better": better}


def test_repeated_items_have_another_order_and_are_marked(folder):
  client = client_of(folder, {"x-annotator": "ann"}, repeats=1.0)
  items = [client.get("/api/item").json()]
  while items[-1]["item"]:
    items.append(client.post("/api/answer", json=answer_to(items[-1])).json()["next"])
  first, repeated = items[:6], items[6:12]
  assert len(items) == 13 and client.get("/api/state").json()["total"] == 12
  assert {item["item"] for item in first}.isdisjoint(item["item"] for item in repeated)
  for one, two in zip(first, repeated, strict=True):
    assert one["known"] == two["known"] and one["answer"] == two["answer"] is None
    ids = [[candidate["id"] for candidate in item["candidates"]] for item in (one, two)]
    assert ids[0] != ids[1] and sorted(ids[0]) == sorted(ids[1])
  rows = read_lines(folder / "annotations.jsonl")
  assert [row.get("repeat") for row in rows] == [None] * 18 + [True] * 18


# ---------------------------------------------------------------------------------------- attacks


@pytest.mark.parametrize(
  "headers",
  [
    {},
    {"authorization": "token-of-ann"},
    {"authorization": "Bearer token-of-ann1"},
    {"authorization": "Bearer "},
    {"authorization": "Bearer token-öf-ann".encode("latin1")},
    {"x-annotator": "ann"},
  ],
)
def test_request_without_a_valid_token_gets_401(folder, headers):
  client = client_of(folder, invited=INVITED)
  for method, url in (("GET", "/api/state"), ("GET", "/api/item"), ("POST", "/api/answer")):
    answer = client.request(method, url, headers=headers)
    assert answer.status_code == 401 and "open the link" in answer.text
    assert answer.headers["content-type"].startswith("text/plain")
  assert client.get("/api/mode").json() == {"open": False}
  assert not (folder / "annotations.jsonl").exists()


@pytest.mark.parametrize("name", ["", "%20", "%0A", "%ff", "x" * 41, "simulated_0"])
def test_name_that_cannot_be_written_gets_401(folder, name):
  answer = client_of(folder).get("/api/state", headers={"x-annotator": name})
  assert answer.status_code == 401 and answer.text.count("\n") == 0


def test_script_in_a_name_is_data(folder):
  answer = client_of(folder, {"x-annotator": "%3Cscript%3Ex"}).get("/api/state")
  assert answer.json()["annotator"] == "<script>x"
  assert answer.headers["content-type"] == "application/json"
  assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("prefix", ["/image/", "/static/", "/", "/api/item?item="])
@pytest.mark.parametrize(
  "path",
  ["../prompts.jsonl", "..%2fprompts.jsonl", "%2e%2e/%2e%2e/etc/passwd", "%00", ".label_secret"],
)
def test_no_url_reaches_another_file(client, prefix, path):
  answer = client.get(prefix + path)
  assert answer.status_code in (400, 404)
  assert "image_0" not in answer.text and "root:" not in answer.text


def bad_messages() -> dict:
  huge = "[" * 10_000
  scores = lambda value: (
    lambda item: json.dumps(
      answer_to(item) | {"scores": dict.fromkeys(answer_to(item)["scores"], value)}
    )
  )
  three = {"structure": 1, "texture": 1, "overall": 1}
  changed = lambda **x: lambda item: json.dumps(answer_to(item) | x)
  criterion = lambda value: scores(three | {"texture": value})
  foreign = lambda item: json.dumps(
    answer_to(item, scores=dict.fromkeys([*list(answer_to(item)["scores"])[1:], "0" * 32], three))
  )
  return {
    "empty": (lambda _: "", "not JSON"),
    "list": (lambda _: "[]", "type list; expected an object"),
    "nested": (lambda _: huge, "nested too deeply"),
    "bytes": (lambda _: b"\xff", "not text in UTF-8"),
    "digits": (lambda _: "1" * 5000, "digits"),
    "no item": (lambda _: "{}", "item is None"),
    "foreign item": (changed(item="0" * 44), "item is '0+'; expected one of ann"),
    "surrogate": (changed(item="\ud800"), "item is "),
    "long item": (changed(item="x" * 100_000), "item is "),
    "no seconds": (changed(seconds=None), "seconds is None; expected a number"),
    "negative": (changed(seconds=-1), "seconds is -1; expected"),
    "endless": (changed(seconds=float("inf")), "seconds is inf; expected"),
    "no scores": (changed(scores=None), "scores are not of the candidates"),
    "some scores": (changed(scores={}), "scores are not of the candidates"),
    "foreign candidate": (foreign, "scores are not of the candidates"),
    "pair": (changed(scores=None, better=None), "scores are not of the candidates"),
    "number": (scores(3), "scores are 3; expected structure, texture, overall"),
    "two": (scores({"structure": 1, "texture": 1}), "expected structure, texture, overall"),
    "four": (scores(three | {"x": 1}), "expected structure, texture, overall"),
    "NaN": (criterion(float("nan")), "texture is nan; expected an integer from 0 to 7"),
    "high": (criterion(8), "texture is 8; expected an integer from 0 to 7"),
    "low": (criterion(-1), "texture is -1; expected"),
    "half": (criterion(3.5), "texture is 3.5; expected an integer"),
    "bool": (criterion(True), "texture is True; expected"),
    "text": (criterion("7"), "texture is '7'; expected"),
  }


@pytest.mark.parametrize("kind", bad_messages())
def test_bad_answer_is_refused_in_one_line(client, folder, kind):
  make, expected = bad_messages()[kind]
  content = make(client.get("/api/item").json())
  answer = client.post("/api/answer", content=content)
  assert answer.status_code == 400 and re.search(expected, answer.text), answer.text
  assert "\n" not in answer.text and len(answer.text) < 300
  assert not (folder / "annotations.jsonl").exists()


def test_answer_to_an_item_of_another_annotator_is_refused(client, folder):
  item = client.get("/api/item").json()
  answer = client.post("/api/answer", json=answer_to(item), headers=BOB)
  assert answer.status_code == 400 and "expected one of bob" in answer.text
  assert client.get("/api/item", params={"item": item["item"]}, headers=BOB).status_code == 400
  assert not (folder / "annotations.jsonl").exists()


def test_names_are_asked_of_pages_of_this_machine_only(client, folder):
  evil = {"host": "evil.example", "x-annotator": "ann"}
  assert client_of(folder).get("/api/mode", headers=evil).status_code == 421
  # A proxy may give any name to a server that asks for tokens.
  assert client.get("/api/item", headers={"host": "label.example.org"}).status_code == 200


def test_other_pages_and_huge_bodies_are_refused(client):
  assert client.post("/api/answer", headers={"origin": "http://evil.example"}).status_code == 403
  assert client.post("/api/answer", content=b"x" * 300_000).status_code == 413
  assert client.post("/api/state").status_code == 405


def test_image_that_broke_is_not_named(client, folder):
  item = client.get("/api/item").json()
  files = {file: file.read_bytes() for file in (folder / "inpaint").glob("*.png")}
  try:
    for file, content in files.items():
      file.write_bytes(content[:60])
    answer = client.get(item["candidates"][0]["image"])
  finally:
    for file, content in files.items():
      file.write_bytes(content)
  assert answer.status_code == 500 and answer.text.startswith("the image cannot be read")


def test_answer_that_the_disk_does_not_take_is_not_acknowledged(client, folder, monkeypatch):
  import os

  item = client.get("/api/item").json()
  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    answer = client.post("/api/answer", json=answer_to(item))
  assert (answer.status_code, answer.text) == (507, "the answer is not saved: No space left")
  assert client.get("/api/item").json() == item
  assert client.post("/api/answer", json=answer_to(item)).json()["saved"]
  assert len(read_lines(folder / "annotations.jsonl")) == 3


def test_answer_that_another_program_keeps_out_is_asked_again_until_the_next_start(client, folder):
  item = client.get("/api/item").json()
  (folder / "annotations.jsonl").write_text("\n")
  answer = client.post("/api/answer", json=answer_to(item))
  assert answer.status_code == 507  # the page sends it again
  expected = "the answer is not saved: annotations.jsonl was changed by another program; start "
  assert answer.text == expected + "prefpaint_jax.label again"
  started = client_of(folder, ANN, invited=INVITED, per_prompt=2, repeats=0.0)
  assert started.post("/api/answer", json=answer_to(item)).json()["saved"]


# ---------------------------------------------------------------------------------------- servers


class Annotator(threading.Thread):
  """Answers items until none is left; sends an answer again until it is acknowledged."""

  def __init__(self, root: str, headers: dict, times: list | None = None, look: float = 0.0):
    super().__init__(daemon=True)
    self.root, self.own, self.look = root, headers, look
    self.acknowledged: list[dict] = []
    self.times = [] if times is None else times
    self.failure: str | None = None

  def run(self):
    with httpx.Client(base_url=self.root, headers=self.own, timeout=20) as client:
      item = self.ask(client, "GET", "/api/item")
      while item and item["item"]:
        if self.look:
          for candidate in item["candidates"]:
            client.get(candidate["image"])
          time.sleep(self.look)
        message = answer_to(item, score=len(self.acknowledged) % 8)
        start = time.perf_counter()
        answer = self.ask(client, "POST", "/api/answer", json=message)
        self.times.append(time.perf_counter() - start)
        if not answer:
          return
        self.acknowledged.append(message)
        item = answer["next"]

  def ask(self, client, method: str, url: str, **arguments) -> dict | None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
      try:
        answer = client.request(method, url, **arguments)
      except httpx.TransportError:  # the server is dead
        time.sleep(0.05)
        continue
      if answer.status_code == 200:
        return answer.json()
      self.failure = f"{answer.status_code} {answer.text}"
      return None
    self.failure = "the server did not come back"
    return None


def saved_items(folder) -> Counter:
  """Counts the answers in the file by (annotator, prompt); each one has all candidates."""
  rows = [row for row in read_lines(folder / "annotations.jsonl") if not row.get("repeat")]
  assert not any(row.get("corrects") for row in rows)
  lines = Counter((row["annotator"], row["image_id"]) for row in rows)
  assert set(lines.values()) == {3}
  assert len({(row["annotator"], row["candidate"]) for row in rows}) == len(rows)
  return Counter(image_id for _, image_id in lines)


@pytest.mark.slow
@pytest.mark.parametrize("invited", [True, False])
def test_killed_server_loses_and_doubles_no_acknowledged_answer(tmp_path, invited):
  folder = write_candidates(tmp_path / "candidates", 60)
  names = [f"ann{i}" for i in range(5)]
  people = tmp_path / "people.txt"
  people.write_text("".join(f"{name} token-of-{name}\n" for name in names))
  flags = ("--per_prompt=3", *([f"--annotators={people}"] if invited else []))
  clients: list[Annotator] = []
  port = "0"
  for kill_after in (40, 60, None):
    with label_server(folder, f"--port={port}", *flags) as (process, lines):
      root = re.search(r"http://127.0.0.1:(\d+)/", lines[0])
      port = root[1]
      for name in names if not clients else ():
        headers = {"authorization": f"Bearer token-of-{name}"} if invited else {"x-annotator": name}
        clients.append(Annotator(root[0], headers))
        clients[-1].start()
      if kill_after:
        goal = kill_after + sum(len(client.acknowledged) for client in clients)
        while sum(len(client.acknowledged) for client in clients) < goal:
          time.sleep(0.002)
        process.kill()  # SIGKILL
      else:
        for client in clients:
          client.join(120)
  assert [client.failure for client in clients] == [None] * 5
  rows = read_lines(folder / "annotations.jsonl")
  counts = saved_items(folder)
  acknowledged = sum(len(client.acknowledged) for client in clients)
  assert len(rows) == 3 * acknowledged
  assert len(counts) == 60
  if invited:
    assert set(counts.values()) == {3}
  else:  # an answer to an item that was given to another annotator meanwhile is kept too
    assert min(counts.values()) == 3 and max(counts.values()) <= 4


@pytest.mark.slow
def test_second_server_of_a_folder_is_refused(tmp_path):
  folder = write_candidates(tmp_path / "candidates", 1)
  with label_server(folder, "--port=0"):
    command = [sys.executable, "-m", "prefpaint_jax.label", f"--candidates={folder}", "--port=0"]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
  assert second.returncode == 1
  assert re.fullmatch(rf"error: {folder} is in use by process \d+ on .*\n", second.stderr)


@pytest.mark.slow
def test_server_that_is_interrupted_twice_prints_no_traceback(tmp_path):
  folder = write_candidates(tmp_path / "candidates", 1)
  command = [sys.executable, "-m", "prefpaint_jax.label", f"--candidates={folder}", "--port=0"]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
    assert httpx.get(process.stdout.readline().strip()).status_code == 200
    for _ in range(2):  # an impatient Ctrl-C
      process.send_signal(signal.SIGINT)
      time.sleep(0.03)
    assert process.communicate(timeout=60)[1].strip() in ("", "Interrupted.")


@pytest.mark.slow
def test_twenty_annotators_score_a_thousand_prompts(tmp_path, capsys):
  folder = write_candidates(tmp_path / "candidates", 1000)
  times: list[float] = []
  with label_server(folder, "--port=0", "--per_prompt=1") as (_, lines):
    clients = [Annotator(lines[0], {"x-annotator": f"ann{i}"}, times, 0.3) for i in range(20)]
    for client in clients:
      client.start()
    for client in clients:
      client.join(300)
  assert [client.failure for client in clients] == [None] * 20
  assert set(saved_items(folder).values()) == {1} and len(saved_items(folder)) == 1000
  with capsys.disabled():
    p50, p95 = np.quantile(times, [0.5, 0.95]) * 1000
    print(f"\n{len(times)} answers of 20 annotators: median {p50:.0f} ms, p95 {p95:.0f} ms")
