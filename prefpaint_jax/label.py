"""Serves a page on which people score the candidates that `prefpaint_jax.collect` wrote.

  python -m prefpaint_jax.label --candidates=runs/candidates
  python -m prefpaint_jax.label --candidates=runs/candidates --host=0.0.0.0 --annotators=people.txt
  python -m prefpaint_jax.label --candidates=runs/candidates --report

Each answer is appended to annotations.jsonl (with --mode=pairs to pairs.jsonl) in that folder
before the page shows the next prompt. Start the command again to go on. See docs/labelling.md.
"""

from pathlib import Path

from absl import flags

from prefpaint_jax.labelling.app import make_app
from prefpaint_jax.labelling.invitations import read_invitations
from prefpaint_jax.labelling.session import Labelling
from prefpaint_jax.labelling.store import MODES
from prefpaint_jax.runtime import cli
from prefpaint_jax.runtime.cli import within
from prefpaint_jax.runtime.config_fields import SEED, SHARE
from prefpaint_jax.runtime.files import check_is_folder
from prefpaint_jax.runtime.ranges import Integer, Text
from prefpaint_jax.runtime.workdir import exclusive
from prefpaint_jax.web import server

if __name__ == "__main__":
  _CANDIDATES = flags.DEFINE(
    within(Text(empty=False)), "candidates", None, "Workdir of prefpaint_jax.collect."
  )
  _HOST = flags.DEFINE(
    within(Text(empty=False)), "host", "127.0.0.1", "Address; others than this need --annotators."
  )
  _PORT = flags.DEFINE(within(Integer(0, 65535)), "port", 8000, "Port; 0: a free one.")
  _MODE = flags.DEFINE_enum("mode", "scores", list(MODES), "Score candidates, or compare two.")
  _PER_PROMPT = flags.DEFINE(within(Integer(1, 1000)), "per_prompt", 3, "Annotators per prompt.")
  _REPEATS = flags.DEFINE(within(SHARE), "repeats", 0.05, "Share of items that are shown again.")
  _ANNOTATORS = flags.DEFINE(
    within(Text(empty=False)),
    "annotators",
    None,
    "File of a NAME or NAME TOKEN a line; missing tokens are added to it.",
  )
  _ORDER = flags.DEFINE_enum(
    "order", "random", ["random", "uncertain"], "Which prompts come first."
  )
  _REWARD = flags.DEFINE(
    within(Text(empty=False)), "reward", None, "Reward model with a bound, of --order=uncertain."
  )
  _SEED = flags.DEFINE(within(SEED), "seed", 0, "Seed of the orders and of the repeated items.")
  _REPORT = flags.DEFINE_bool("report", False, "Write label_report.html and end.")
  flags.mark_flag_as_required("candidates")

  def main() -> None:
    folder, host = Path(_CANDIDATES.value), _HOST.value
    check_is_folder(folder, "the --workdir of prefpaint_jax.collect")
    if _REPORT.value:
      from prefpaint_jax.labelling import report  # here, because it is slow to import

      report.write(folder)
      print(folder / "label_report.html")
      return
    server.check_installed()
    if _ANNOTATORS.value is None and not server.is_loopback(host):
      raise ValueError(f"--host={host} is reached from other machines; give --annotators=FILE")
    if (_ORDER.value == "uncertain") != (_REWARD.value is not None):
      raise ValueError("--order=uncertain and --reward=FOLDER need each other; give both or none")
    if not any(folder.glob("inpaint/*.png")):  # before the lock, a file in the folder
      raise ValueError(f"{folder}: no candidates to show; run prefpaint_jax.collect first")
    with exclusive(folder), server.listening(host, _PORT.value) as opened:
      invited = _ANNOTATORS.value and read_invitations(Path(_ANNOTATORS.value))
      if invited and len(invited) < _PER_PROMPT.value:
        raise ValueError(
          f"--per_prompt={_PER_PROMPT.value} is more than the {len(invited)} annotators of "
          f"{_ANNOTATORS.value}; give less, or add names"
        )
      order = None
      if _REWARD.value is not None:
        from prefpaint_jax.labelling.order import uncertain  # here, because it imports JAX

        order = uncertain(folder, _REWARD.value)
      labelling = Labelling(
        folder,
        _MODE.value,
        _PER_PROMPT.value,
        _REPEATS.value,
        _SEED.value,
        invited,
        order,
      )
      app = make_app(labelling, host)
      root = server.address(host, opened)
      for token, name in (invited or {"": ""}).items():
        print(f"{name}: {root}#{token}" if name else root, flush=True)
      server.serve(app, opened)

  cli.run(main)
