"""The files of labelling: what is shown, the answers, torn lines, full disks, invitations."""

import json
import resource
import signal
from pathlib import Path

import pytest
from labelling_world import read_lines, write_candidates
from PIL import Image

from prefpaint_jax.data.annotation_files import CandidateEntry, PromptEntry
from prefpaint_jax.data.examples import CRITERIA
from prefpaint_jax.labelling.invitations import clean_name, read_invitations
from prefpaint_jax.labelling.store import (
  Answer,
  AnswerFile,
  Item,
  Shown,
  Unit,
  read_secret,
  read_shown,
)

UNITS = [Unit(f"image_{i}", tuple(f"image_{i}_{k}" for k in range(3))) for i in range(4)]
PAIRS = [Unit("image_0", ("image_0_0", "image_0_1")), Unit("image_0", ("image_0_0", "image_0_2"))]
PROMPTS = {unit.image_id: PromptEntry("", "noise", 0, unit.image_id) for unit in UNITS}
CANDIDATES = {x: CandidateEntry("", unit.image_id, "") for unit in UNITS for x in unit.candidates}
SCORES, IN_PAIRS = (Shown(PROMPTS, CANDIDATES, units, {}) for units in (UNITS, PAIRS))


def scores(unit: int, score: int = 3) -> Answer:
  return Answer({x: dict.fromkeys(CRITERIA, score) for x in UNITS[unit].candidates}, 1.5)


def save(file: AnswerFile, annotator: str, item: Item, answer: Answer) -> None:
  file.append(list(file.rows(annotator, item, answer, "image_0_0")))
  file.take(annotator, item, answer)


def written(folder: Path, *answers: tuple, shown=SCORES, mode="scores") -> bytes:
  """Saves answers; returns the content of the file."""
  file = AnswerFile(folder, mode, shown)
  for answer in answers:
    save(file, *answer)
  file.close()
  return file._path.read_bytes()


def test_answers_are_read_as_they_were_written(tmp_path):
  given = [("Ann", Item(2), scores(2)), ("Zoë", Item(0), scores(0, 7)), ("Ann", Item(0), scores(0))]
  written(tmp_path, *given)
  read = AnswerFile(tmp_path, "scores", SCORES)
  assert [(*key, answer) for key, answer in read.answers.items()] == given
  first = read_lines(tmp_path / "annotations.jsonl")[0]
  about = {"image_id", "candidate", "annotator", "seconds", "time", *CRITERIA}
  assert set(first) == about and first["time"].endswith("+00:00")


def test_correction_and_repetition_are_marked(tmp_path):
  again = Item(0, repeat=True)
  given = [Item(0), Item(0), again, again, Item(1)]
  written(tmp_path, *(("Ann", item, scores(item.unit, i)) for i, item in enumerate(given)))
  rows = read_lines(tmp_path / "annotations.jsonl")
  marks = [(row.get("corrects"), row.get("repeat")) for row in rows[::3]]
  assert marks == [(None, None), (True, None), (None, True), (True, True), (None, None)]
  read = AnswerFile(tmp_path, "scores", SCORES).answers
  assert read["Ann", Item(0)] == scores(0, 1) and read["Ann", again] == scores(0, 3)


def test_answers_to_pairs_are_read_as_they_were_written(tmp_path):
  given = [("Ann", Item(0), Answer("image_0_1", 1.0)), ("Ann", Item(1), Answer(None, 2.0))]
  written(
    tmp_path, *given, ("Ann", Item(1), Answer("image_0_2", 2.0)), shown=IN_PAIRS, mode="pairs"
  )
  rows = read_lines(tmp_path / "pairs.jsonl")
  assert [row["better"] for row in rows] == ["image_0_1", None, "image_0_2"]
  assert rows[0]["candidates"] == ["image_0_0", "image_0_1"] and rows[2]["corrects"] is True
  assert {row["left"] for row in rows} == {"image_0_0"}
  read = AnswerFile(tmp_path, "pairs", IN_PAIRS).answers
  assert read["Ann", Item(1)].content == "image_0_2"


def test_answer_that_was_cut_anywhere_keeps_its_whole_lines_and_is_given_again(tmp_path):
  file = tmp_path / "annotations.jsonl"
  before = written(tmp_path, ("Ann", Item(0), scores(0)), ("Bob", Item(0), scores(0)))
  whole = written(tmp_path, ("Ann", Item(1), scores(1)))
  ends = [end for end, byte in enumerate(whole, 1) if byte == ord("\n")]
  sizes = {*range(len(before), len(whole) - 1, 40), *ends[6:-1], *(end - 1 for end in ends[6:-1])}
  for size in sorted(sizes):
    file.write_bytes(whole[:size])
    read = AnswerFile(tmp_path, "scores", SCORES)
    assert list(read.answers) == [("Ann", Item(0)), ("Bob", Item(0))]
    lines = [end for end in ends if end <= size + 1]  # a line that lacks only its end is whole
    assert file.read_bytes() == whole[: lines[-1]]
    save(read, "Ann", Item(1), scores(1, 7))
    read.close()
    marks = [row.get("corrects") for row in read_lines(file)[len(lines) :]]
    assert marks == [True] * (len(lines) - 6) + [None] * (9 - len(lines))
    assert AnswerFile(tmp_path, "scores", SCORES).answers["Ann", Item(1)] == scores(1, 7)


def test_last_answer_stays_if_its_prompt_gets_another_candidate(tmp_path):
  content = written(tmp_path, ("Ann", Item(0), scores(0)))
  more = Unit("image_0", (*UNITS[0].candidates, "image_0_3"))
  known = CANDIDATES | {"image_0_3": CandidateEntry("", "image_0", "")}
  read = AnswerFile(tmp_path, "scores", Shown(PROMPTS, known, [more], {}))
  assert not read.answers  # the prompt is shown again, with all four
  assert (tmp_path / "annotations.jsonl").read_bytes() == content


def test_last_line_of_an_editor_without_newline_is_kept(tmp_path):
  line = {"image_id": "image_0", "candidate": "image_0_0.png", "annotator": 7}
  line |= dict.fromkeys(CRITERIA, 3.5)
  (tmp_path / "annotations.jsonl").write_text("\n" + json.dumps(line))
  content = written(tmp_path, ("7", Item(0), scores(0)))
  rows = [json.loads(x) for x in content.splitlines()[1:]]
  assert rows[0] == line
  assert [row.get("corrects") for row in rows[1:]] == [True, None, None]


def test_full_disk_leaves_the_file_as_it_was(tmp_path):
  before = written(tmp_path, ("Ann", Item(0), scores(0)))
  file = AnswerFile(tmp_path, "scores", SCORES)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    with pytest.raises(OSError, match="too large"):
      save(file, "Ann", Item(1), scores(1))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
  assert (tmp_path / "annotations.jsonl").read_bytes() == before
  save(file, "Ann", Item(1), scores(1))
  assert len(AnswerFile(tmp_path, "scores", SCORES).answers) == 2


@pytest.mark.parametrize("change", ["append", "replace", "remove"])
def test_file_that_another_program_changes_takes_no_answer(tmp_path, change):
  content = written(tmp_path, ("Ann", Item(0), scores(0)))
  file, path = AnswerFile(tmp_path, "scores", SCORES), tmp_path / "annotations.jsonl"
  path.rename(tmp_path / "moved")
  if change != "remove":
    path.write_bytes(content)
  if change == "append":
    (tmp_path / "moved").rename(path)
    path.write_bytes(content + b"\n")
  with pytest.raises(OSError, match=r"annotations.jsonl was changed by another program; start"):
    save(file, "Ann", Item(1), scores(1))


@pytest.mark.parametrize(
  ("change", "expected"),
  [
    ({"candidate": "image_9_0"}, "candidate 'image_9_0' does not belong"),
    ({"image_id": "nobody"}, "unknown image id 'nobody'"),
    ({"overall": 8}, "overall is 8; expected a number from 0 to 7"),
    ({"overall": None}, "overall is null; expected"),
    ({"annotator": ""}, "annotator: expected a non-empty string"),
    ({"annotator": "simulated_0"}, "simulated_0 is simulated; move the file"),
  ],
)
def test_bad_line_is_named(tmp_path, change, expected):
  row = {"image_id": "image_0", "candidate": "image_0_0", "annotator": "Ann"}
  row |= dict.fromkeys(CRITERIA, 3) | change
  (tmp_path / "annotations.jsonl").write_text("\n" + json.dumps(row) + "\n")
  with pytest.raises(ValueError, match=rf"annotations.jsonl:2: {expected}"):
    AnswerFile(tmp_path, "scores", SCORES)
  assert (tmp_path / "annotations.jsonl").read_text() == "\n" + json.dumps(row) + "\n"


def test_answers_of_the_other_mode_are_refused(tmp_path):
  written(tmp_path, ("Ann", Item(0), scores(0)))
  with pytest.raises(
    ValueError, match=r"has annotations\.jsonl, and --mode=pairs writes pairs\.jsonl"
  ):
    AnswerFile(tmp_path, "pairs", IN_PAIRS)


def test_units_are_prompts_or_each_two_candidates(tmp_path):
  folder = write_candidates(tmp_path / "candidates", 2, candidates=4)
  shown = read_shown(folder, "scores")
  assert [len(unit.candidates) for unit in shown.units] == [4, 4]
  pairs = read_shown(folder, "pairs").units
  assert len(set(pairs)) == len(pairs) == 2 * 6
  assert all(unit.candidates == tuple(sorted(unit.candidates)) for unit in pairs)


@pytest.mark.parametrize(
  ("file", "size", "expected"),
  [
    ("inpaint/image_1_2.png", (9, 8), "is 9x8, .* is 8x8; give both one size"),
    ("inpaint/image_1_2.png", None, "image_1_2.png: .*collect the candidates again"),
    ("masks/image_0_mask.png", None, "image_0_mask.png: .*collect the candidates again"),
    ("images/image_0.png", None, "image_0_mask_color.png: .*collect the candidates again"),
  ],
)
def test_image_that_cannot_be_shown_is_named(tmp_path, file, size, expected):
  folder = write_candidates(tmp_path / "candidates", 2)
  (folder / file).unlink()
  if size:
    Image.new("RGB", size).save(folder / file)
  with pytest.raises(ValueError, match=expected):
    read_shown(folder, "scores")


def test_secret_is_of_the_folder_and_only_the_user_reads_it(tmp_path):
  secret = read_secret(tmp_path)
  assert read_secret(tmp_path) == secret and len(secret) == 64
  assert (tmp_path / ".label_secret").stat().st_mode & 0o777 == 0o600


def test_tokens_are_drawn_once_and_kept(tmp_path):
  file = tmp_path / "people.txt"
  file.write_text("# team\n\nann own-token\nbob\nJosé\n")
  invited = read_invitations(file)
  assert invited["own-token"] == "ann" and list(invited.values()) == ["ann", "bob", "José"]
  assert min(map(len, list(invited)[1:])) >= 24  # 144 bits
  assert read_invitations(file) == invited
  assert file.read_text().startswith("# team\n\nann own-token\nbob ")
  assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
  ("content", "expected"),
  [
    ("", "names nobody; write one name a line"),
    ("ann own token\n", "line 1: 3 words; expected NAME or NAME TOKEN"),
    (
      "ann short-1\n",
      "line 1: 'short-1' is no token of 8 or more of .*; remove it, and one is drawn",
    ),
    ("Ann Blankenship\n", "line 1: 'Blankenship' is no token .*; a name is one word"),
    ("ann to/ken-1?x=2\n", "line 1: 'to/ken-1.x=2' is no token"),
    ("ann\nann\n", "line 2: ann or the token is in a line before"),
    ("ann same-token\nbob same-token\n", "line 2: bob or the token is in a line before"),
    ("\nsimulated_1\n", "line 2: the name is 'simulated_1'; only simulated"),
    (f"{'a' * 41}\n", "line 1: the name is 'a+'; expected 1 to 40"),
  ],
)
def test_bad_invitations_are_refused_in_one_line(tmp_path, content, expected):
  file = tmp_path / "people.txt"
  file.write_text(content)
  with pytest.raises(ValueError, match=rf"\A{file}.*{expected}"):
    read_invitations(file)
  assert file.read_text() == content


def test_name_has_one_form():
  assert clean_name(" Jose\u0301 ") == "José"
  for name in ("", " ", "a\nb", "a\u202eb", "\ud800", "\0"):
    with pytest.raises(ValueError, match="expected 1 to 40 printable letters"):
      clean_name(name)
