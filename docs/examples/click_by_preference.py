"""Drives the page of labelling in a browser, as annotators with the simulated preference.

  python -m prefpaint_jax.label --candidates=FOLDER
  python docs/examples/click_by_preference.py FOLDER http://127.0.0.1:8000/ ann ben eve

Needs `pip install playwright` and Chromium. The annotators work at the same time, each in a browser
context. They recognise the candidates by the pixels on the page, and give the scores of
preference/simulation.py with its noise. Every second annotator uses the mouse, the others the keys.
"""

import asyncio
import hashlib
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
from playwright.async_api import Browser, Page, async_playwright

from prefpaint_jax.data.annotation_files import read_candidates, read_prompts
from prefpaint_jax.data.examples import CRITERIA
from prefpaint_jax.data.images import load_image, load_mask, to_bytes
from prefpaint_jax.preference import simulation

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
READY = "main:not([aria-busy])"
# SHA-256 of the RGB values of each candidate on the page, in their order.
SHOWN = """() => Promise.all([...document.querySelectorAll("img.candidate")].map(async (image) => {
  const {naturalWidth: width, naturalHeight: height} = image;
  const context = Object.assign(document.createElement("canvas"), {width, height}).getContext("2d");
  context.drawImage(image, 0, 0);
  const rgb = context.getImageData(0, 0, width, height).data.filter((_, i) => i % 4 < 3);
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", rgb));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}))"""

Scores = dict[str, float]


def read_truth(folder: Path) -> dict[str, tuple[str, Scores]]:
  """Returns {SHA-256 of the pixels: (candidate, its scores without noise)} of all candidates."""
  errors: list[str] = []
  prompts = read_prompts(folder, errors)
  truth = {}
  for name, candidate in read_candidates(folder, prompts, errors).items():
    image = load_image(folder / "inpaint" / f"{name}.png")
    mask = load_mask(folder / "masks" / f"{candidate.image_id}_mask.png")
    scores = simulation.true_preference(image[None], mask[None], [prompts[candidate.image_id].text])
    digest = hashlib.sha256(to_bytes(image).tobytes()).hexdigest()
    truth[digest] = name, {criterion: scores[criterion] for criterion in CRITERIA}
  if errors:
    raise ValueError(f"{folder}/{errors[0]}")
  return truth


async def score(page: Page, scores: list[Scores], uses_mouse: bool) -> None:
  """Gives the candidates their scores."""
  values = [given[criterion] for given in scores for criterion in CRITERIA]
  for cell, value in enumerate(values):
    if uses_mouse:
      await page.locator(".scale").nth(cell).locator("button").nth(value).click()
    else:
      await page.keyboard.press(str(value))
  await (page.click("#submit") if uses_mouse else page.keyboard.press("Enter"))


async def compare(page: Page, scores: list[Scores], uses_mouse: bool) -> None:
  """Chooses the candidate with the higher combined score, or equal."""
  left, right = (simulation.combine(given) for given in scores)
  place = None if np.isclose(left, right) else int(right > left)
  if uses_mouse:
    await page.click("#submit" if place is None else f".card:nth-child({place + 1}) .choice")
  else:
    await page.keyboard.press("ArrowDown" if place is None else ("ArrowLeft", "ArrowRight")[place])


async def annotate(
  browser: Browser, address: str, name: str, uses_mouse: bool, truth: dict, noise: float
) -> list[dict[str, Scores]]:
  """Answers as one annotator until nothing is left; returns {candidate: scores} of each answer."""
  page = await (await browser.new_context()).new_page()
  await page.goto(address)
  await page.fill("#given", name)
  await page.click("text=Start")
  rng, answers = np.random.default_rng(zlib.crc32(name.encode())), []
  while True:
    await page.wait_for_selector(READY, state="attached")
    if await page.evaluate("document.body.dataset.view") != "item":
      return answers
    known = [truth[digest] for digest in await page.evaluate(SHOWN)]
    drawn = [simulation.annotate(rng, scores, 1, noise) for _, scores in known]
    scores = [{criterion: int(values[0, 0]) for criterion, values in x.items()} for x in drawn]
    answers.append(dict(zip((candidate for candidate, _ in known), scores, strict=True)))
    is_pair = await page.evaluate("document.body.dataset.mode") == "pairs"
    await (compare if is_pair else score)(page, scores, uses_mouse)


async def click(
  folder: Path, address: str, names: list[str], noise: float = 0.7
) -> dict[str, list[dict[str, Scores]]]:
  """Answers as several annotators at once; returns the answers of each, in their order."""
  truth = read_truth(folder)
  async with async_playwright() as engine:
    browser = await engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    people = (
      annotate(browser, address, name, bool(place % 2), truth, noise)
      for place, name in enumerate(names)
    )
    return dict(zip(names, await asyncio.gather(*people), strict=True))


if __name__ == "__main__":
  for annotator, answers in asyncio.run(
    click(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
  ).items():
    print(f"{annotator}: {len(answers)} answers")
