"""Tests that the report of an evaluation is well-formed, self-contained, complete and escaped."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from prefpaint_jax.data.masks import OUTPAINTING, WARPING
from prefpaint_jax.evaluation import (
  drift,
  fidelity,
  gallery,
  histogram,
  report,
  tables,
  winrate,
  witnesses,
)
from prefpaint_jax.evaluation.winrate import Scores
from prefpaint_jax.web import report_page

VOID = {"meta", "img"}


class Page(HTMLParser):
  """Parses a page into elements (tag, attributes) and texts; asserts that the tags are balanced."""

  def __init__(self, source: str):
    super().__init__()
    self.elements, self.texts, self._open = [], [], []
    self.feed(source)
    self.close()
    assert not self._open

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    if tag not in VOID:
      self._open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    if self._open[-1:] != ["style"]:
      self.texts.append(data)

  def having(self, tag):
    return [attributes for name, attributes in self.elements if name == tag]


def example(size=(8, 8), seed=0, name="prompt 7, warping", known=True):
  *images, original = np.random.default_rng(seed).random((4, *size, 3)).astype(np.float32)
  return gallery.Example(name, *images, {"learned": (1.25, -0.5)}, original if known else None)


@pytest.fixture(scope="module")
def evaluation():
  """Returns arguments of `write_report` for three judges and two kinds of prompts."""
  rng = np.random.default_rng(0)
  baseline = rng.standard_normal((30, 11))
  scores = {
    "learned": Scores(baseline + 0.8 + 0.5 * rng.standard_normal((30, 11)), baseline),
    "true <b>preference</b>": Scores(baseline - 0.9, baseline),
    "same": Scores(baseline + 1e-3, baseline),
  }
  measures = {
    name: {"brightness": draw + 0.5, "seam": draw}
    | ({"contrast": 3 + draw} if shift else {"contrast": draw})
    for name, shift, draw in (("policy", 1, baseline), ("baseline", 0, baseline))
  }
  return {
    "title": "policy <i>A</i> & baseline",
    "about": {"policy": "<script>alert('x')</script>", "command": 'run --a="<b>"', "prompts": "30"},
    "summary": winrate.summarise(scores, np.repeat([OUTPAINTING, WARPING], [10, 20])),
    "scores": scores,
    "witnesses": {
      "rule": witnesses.RULE,
      "prompts": 30,
      "measures": {
        "error": {
          "baseline": 0.31,
          "policy": 0.29,
          "change": {"value": -0.02, "low": -0.03, "high": 0.01},
        }
      },
    },
    "drift": drift.drift(measures["policy"], measures["baseline"], {"seam": np.full(30, 0.125)}),
    "fidelity": fidelity.compare(
      *({"psnr": np.full((30, 2), x), "mse": np.full((30, 2), 0.5)} for x in (25.5, np.inf))
    ),
    "policies": [["policy", "CLIP"], ["<u>base</u>", "-25.5 [-26, -25]"]],
    "gallery": {
      "Largest <gains>": [example()],
      "Near the median": [example(seed=1, known=False)._replace(text="a <u>text</u> & more")] * 2,
    },
  }


@pytest.fixture(scope="module")
def page(evaluation, tmp_path_factory):
  path = tmp_path_factory.mktemp("report") / "new" / "report.html"
  report.write_report(path, **evaluation)
  assert [file.name for file in path.parent.iterdir()] == ["report.html"]
  return Page(path.read_text(encoding="utf-8"))


def test_page_is_self_contained(page):
  for tag, attributes in page.elements:
    assert tag not in ("script", "link", "iframe", "base")
    for name in ("src", "href", "srcset", "action"):
      assert attributes.get(name, "data:").startswith("data:")
    assert not any(name.startswith("on") for name in attributes)
  assert "http" not in report_page.STYLE.read_text() and "url(" not in report_page.STYLE.read_text()
  assert "@import" not in report_page.STYLE.read_text()


def test_page_has_every_value_of_the_tables(page, evaluation):
  texts = {text.strip() for text in page.texts}
  shown = lambda statistic, number: tables.show(statistic, number).replace("-", "−")
  for judge, groups in evaluation["summary"].items():
    assert f"Judge: {judge}" in texts
    for kind, group in groups.items():
      assert kind in texts and str(group["prompts"]) in texts
      for statistic, found in group.items():
        if statistic in ("prompts", "left_out"):
          continue
        value, low, high = (shown(statistic, found[key]) for key in ("value", "low", "high"))
        assert tables.LABELS[statistic] in texts
        assert value in texts and f"[{low}, {high}]" in texts
  for name, found in evaluation["drift"]["measures"].items():
    assert name in texts and drift.MEASURES[name] in texts
    for key in ("baseline", "policy", "seed_variation", "spread"):
      assert f"{found[key]:.4f}".replace("-", "−") in texts
    assert f"{found['change']:+.4f}".replace("-", "−") in texts
  assert {"0.3100", "0.2900", "−0.0200", "[−0.0300, +0.0100]", witnesses.RULE} <= texts
  assert "0.1250" in texts and evaluation["drift"]["rule"] in texts
  assert page.texts.count("flagged") == 1  # contrast
  assert {"PSNR", "MSE", "0.5", "[0.5, 0.5]", "–", "30", fidelity.RULE} <= texts
  assert {"All policies", "CLIP", "<u>base</u>", "−25.5", "[−26, −25]"} <= texts


def test_headline_names_the_preferred_side(page):
  text = "".join(page.texts)
  first = text.index("The policy is preferred.")
  assert first < text.index("The baseline is preferred.") < text.index("No preference is")
  assert "WinRate over 30 prompts" in text


def test_every_headline_names_the_flagged_drifts(page, evaluation):
  assert page.texts.count("Drift is flagged: contrast") == len(evaluation["summary"])


def test_texts_are_escaped(page):
  text = "".join(page.texts)
  for given in (
    "policy <i>A</i> & baseline",
    "<script>alert('x')</script>",
    'run --a="<b>"',
    "Largest <gains>",
    "true <b>preference</b>",
    "a <u>text</u> & more",
  ):
    assert given in text
  assert not page.having("script") and not page.having("u")


def test_title_and_headings_name_the_policies_and_the_judges_apart(page, evaluation):
  heads = "".join(page.texts)
  assert heads.count(evaluation["title"]) == 2  # of the page and above it
  assert sum(text.startswith("Judge: ") for text in page.texts) == 2 * len(evaluation["summary"])


def test_scales_are_labelled_from_zero_over_one_half_to_one(page):
  start = page.texts.index("0")
  ticks = ["0", "baseline always wins", "½", "1", "policy always wins"]
  assert page.texts[start : start + 5] == ticks and page.texts.count("½") == 3


def test_card_warns_where_the_best_of_ten_is_worse(page, evaluation):
  warnings = [winrate.best_of_warning(groups) for groups in evaluation["summary"].values()]
  assert [bool(warning) for warning in warnings] == [False, True, False]
  assert report_page.typeset(warnings[1]) in page.texts
  assert [a.get("class") for a in page.having("p")].count("warning") == 1 + 3  # each has the drift


def test_gallery_shows_the_true_image_beside_the_samples_where_it_is_known(page, evaluation):
  images = page.having("img")
  assert len(images) == 4 + 3 + 3 and all(image["class"] == "small" for image in images)
  parts = [image["alt"].split(": ")[1] for image in images]
  assert parts == ["prompt", "baseline", "policy", "true image"] + 2 * parts[:3]
  name, prompt, baseline, policy, _, original, _ = evaluation["gallery"]["Largest <gains>"][0]
  for image, given in zip(images[:4], (prompt, baseline, policy, original), strict=True):
    np.testing.assert_allclose(pixels(image) / 255, given, atol=0.51 / 255)
  assert page.texts.count("−0.500") == page.texts.count("1.250") == 3
  assert page.texts.count("a <u>text</u> & more") == 2
  assert [a.get("class") for a in page.having("p")].count("text") == 2  # none without a text


def pixels(attributes):
  kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", attributes["src"]).groups()
  with Image.open(io.BytesIO(base64.b64decode(data))) as image:
    assert image.format.lower() == kind
    return np.asarray(image, np.float32)


def test_large_images_are_reduced_and_the_page_stays_small(evaluation, tmp_path):
  examples = [example((512, 768), seed) for seed in range(6)]  # noise compresses worst
  arguments = evaluation | {"gallery": {"all": examples}}
  report.write_report(tmp_path / "report.html", **arguments)
  assert (tmp_path / "report.html").stat().st_size < 10_000_000 / 3  # a report has 18 examples
  images = Page((tmp_path / "report.html").read_text(encoding="utf-8")).having("img")
  assert len(images) == 24
  for image in images[:3]:
    assert pixels(image).shape == (213, 320, 3) and "class" not in image


@pytest.mark.parametrize(
  "case", ["one prompt", "two samples", "constant", "not finite", "negative"]
)
def test_smallest_and_degenerate_evaluations_have_a_page(case, tmp_path):
  rng = np.random.default_rng(0)
  number, samples = (1 if case == "one prompt" else 5), (2 if case == "two samples" else 3)
  policy, baseline = rng.standard_normal((2, number, samples))
  if case == "constant":
    policy, baseline = np.full((2, 5, 3), 0.25)
  if case == "not finite":
    policy[2, 1], baseline[0, 0] = np.inf, np.nan
  if case == "negative":
    policy, baseline = policy - 100, baseline - 100
  scores = {"judge": Scores(policy, baseline)}
  summary = winrate.summarise(scores, np.zeros(number, int))
  nothing = {"rule": witnesses.UNKNOWN, "prompts": 0, "measures": {}}
  report.write_report(tmp_path / "report.html", "title", {}, summary, scores, nothing)
  page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
  assert witnesses.UNKNOWN in page.texts
  drawings = [d for a in page.having("path") for d in re.findall(r"-?\d+\.?\d*|nan|inf", a["d"])]
  assert drawings and all(0 <= float(number) <= 480 for number in drawings)
  assert ("2 left out" in page.texts) == (case == "not finite")


def test_histogram_draws_the_share_of_each_bin():
  rng = np.random.default_rng(0)
  series = {"baseline": rng.standard_normal(500), "policy": rng.standard_normal(400) + 1}
  paths = re.findall(r'<path class="(\w+)" d="M0 164(V.*?)V164Z"/>', histogram._histogram(series))
  assert [name for name, _ in paths] == ["baseline", "policy"]
  tops, ends = [], None
  for name, path in paths:
    steps = np.array(re.findall(r"V([\d.]+)H([\d.]+)", path), float)
    heights, ends = 164 - steps[:, 0], steps[:, 1]
    np.testing.assert_allclose(np.diff(ends), ends[0], atol=0.11)
    tops.append(heights / heights.sum())
    assert 14 <= len(ends) <= 16  # Rice's rule: 2 · 400^(1/3)
    low, high = min(map(np.min, series.values())), max(map(np.max, series.values()))
    width = (high - low) / 14
    edges = width * np.arange(np.floor(low / width), np.floor(low / width) + len(ends) + 1)
    expected = [np.mean((series[name] >= a) & (series[name] < a + width)) for a in edges[:-1]]
    np.testing.assert_allclose(tops[-1], expected, atol=2e-3)
    scale = heights.max() / expected[int(np.argmax(heights))]  # pixels of a share of 1
  labels = re.findall(r'class="share" x="9" y="([\d.]+)">([\d.]+) %', histogram._histogram(series))
  assert len(labels) >= 2
  for y, percent in labels:
    assert abs(168 - float(y) - scale * float(percent) / 100) < 0.5


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5, 18, 100])
def test_chosen_prompts_are_the_largest_median_and_smallest_gains_each_once(number):
  gains = np.random.default_rng(number).standard_normal(number + 2)
  gains[[0, -1]] = np.nan, -np.inf
  sections = gallery.choose(gains, each=6)
  chosen = np.concatenate([*sections.values(), np.zeros(0, int)]).astype(int)
  assert gallery.choose(gains, each=0) == {}
  assert len(set(chosen)) == len(chosen) == min(number, 3 * min(6, max(1, number // 3)))
  assert np.isfinite(gains[chosen]).all() and (np.diff(gains[chosen]) <= 0).all()
  if number >= 3:
    largest, middle, smallest = sections.values()
    finite = np.sort(gains[1:-1])
    assert gains[largest[0]] == finite[-1] and gains[smallest[-1]] == finite[0]
    below, above = (np.sum(finite < g) for g in gains[middle[[-1, 0]]])
    assert abs((below + above) / 2 - (number - 1) / 2) <= 0.5


@pytest.fixture(scope="module")
def examples():
  """Returns examples of 40 prompts, their scores by two judges, and their images."""
  rng = np.random.default_rng(0)
  scores = {name: Scores(*rng.standard_normal((2, 40, 3))) for name in ("learned", "true")}
  prompts, baseline, policy, originals = images = rng.integers(0, 256, (4, 40, 4, 4, 3), np.uint8)
  names = [f"prompt {i}" for i in range(40)]
  texts = [f"text {i}" for i in range(40)]
  made = gallery.make_examples(names, prompts, baseline, policy, scores, [*originals], texts)
  return made, scores, images


def test_gallery_is_sorted_by_the_first_judge_and_matches_images_with_scores(examples):
  made, scores, images = examples
  gains = scores["learned"].policy[:, 0] - scores["learned"].baseline[:, 0]
  order = np.argsort(-gains)
  sections = gallery.make_gallery(made, each=2)
  shown = [example for examples in sections.values() for example in examples]
  for one, index in zip(shown, order[[0, 1, 19, 20, 38, 39]], strict=True):
    assert (one.name, one.text) == (f"prompt {index}", f"text {index}")
    parts = one.prompt, one.baseline, one.policy, one.original
    for given, image in zip(images, parts, strict=True):
      np.testing.assert_array_equal(image, given[index])
    expected = {judge: (s.policy[index, 0], s.baseline[index, 0]) for judge, s in scores.items()}
    assert one.scores == expected


@pytest.mark.parametrize("known", [True, False])
def test_drawn_examples_are_at_evenly_spaced_ranks_of_the_gain(examples, known):
  made, scores, images = examples
  made = [one if known else one._replace(original=None) for one in made]
  grid = gallery.draw_examples(made, "A", "B", number=4)
  gains = scores["learned"].policy[:, 0] - scores["learned"].baseline[:, 0]
  indices = np.argsort(-gains)[[5, 15, 25, 35]]
  tops = []
  for part in images[: 4 if known else 3]:
    row = np.stack([part[i] for i in indices]).repeat(64, axis=1).repeat(64, axis=2)
    for column, tile in enumerate(row):
      left = column * 274 + 9
      strip = grid[:, left : left + 256]
      starts = np.flatnonzero((strip == tile[0]).all((1, 2)))
      tops.append([y for y in starts if np.array_equal(strip[y : y + 256], tile)])
  assert all(len(found) == 1 for found in tops)
  tops = np.reshape(tops, (-1, 4))
  assert (tops == tops[:, :1]).all() and (np.diff(tops[:, 0]) > 256).all()
  framed = [
    [grid[y - 4, column * 274 + 9].tolist() != [255] * 3 for column in range(4)] for y in tops[:, 0]
  ]
  better = gains[indices] > 0
  assert framed[:3] == [[False] * 4, (~better).tolist(), better.tolist()]


def test_integer_and_float_images_give_the_same_tag():
  levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
  attributes = [re.findall('src="(.*)"', gallery._image_tag(x, "")) for x in (levels, levels / 255)]
  assert attributes[0] == attributes[1]
