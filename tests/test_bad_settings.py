"""Bad settings of every command: one line that names the setting, before anything is written."""

import ast
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from preference_world import load_config

from prefpaint_jax import collect, evaluate, pretrain, train, train_dpo, train_reward
from prefpaint_jax.align.settings import check_prompts, settings_from
from prefpaint_jax.data import preferences
from prefpaint_jax.planning import stages
from prefpaint_jax.runtime import help_pages
from prefpaint_jax.runtime.config_fields import CONFIGS

ROOT = Path(__file__).parents[1]
COMMANDS = {
  "rl": train.train,
  "dpo": train_dpo.train_dpo,
  "pretrain": pretrain.pretrain,
  "collect": collect.collect,
  "eval": evaluate.evaluate,
  "reward": train_reward.train_reward,
  "preferences": preferences.main,
}
NAMES = {
  "rl": "train",
  "dpo": "train_dpo",
  "pretrain": "pretrain",
  "collect": "collect",
  "eval": "evaluate",
  "reward": "train_reward",
  "preferences": "data.preferences",
}
NAN, INF = math.nan, math.inf

FIELDS = [
  *[("rl", "learning_rate", x) for x in (-1.0, 1e30, INF, NAN)],
  *[("rl", "clip_range", x) for x in (-1.0, 0.0, INF, NAN)],
  *[("rl", "kl_weight", x) for x in (-1.0, NAN)],
  *[("rl", "ema_decay", x) for x in (-1.0, 1.0, 2.0)],
  *[("rl", "advantage_clip", x) for x in (-1.0, 0.0, NAN)],
  *[("rl", "trust.k", x) for x in (-1.0, NAN)],
  *[("rl", "trust.b", x) for x in (1e30, NAN)],
  *[("rl", "adam_b1", x) for x in (1.0, 2.0)],
  *[("rl", "seed", x) for x in (-1, 2**32, 2**64)],
  *[("rl", "lora.rank", x) for x in (-1, 100_000)],
  *[("rl", "lora.targets", x) for x in ("(", "")],
  *[("rl", "skip_steps", x) for x in ((1,), (-1, 0), (0, 0, 0))],
  *[("rl", "keep_checkpoints", x) for x in (0, -1)],
  *[("rl", "dtype", x) for x in ("float64", "float", "")],
  ("rl", "trust.constant", -1.0),
  ("rl", "clip_norm", -1.0),
  ("rl", "warmup_updates", -5),
  ("rl", "checkpoint_every", -1),
  ("rl", "max_nan_fraction", NAN),
  ("rl", "decode_batch", -1),
  ("rl", "samples_per_pass", -1),
  ("rl", "updates_per_iteration", 0),
  ("rl", "train_timesteps", 0),
  ("rl", "eval_prompts", -16),
  ("rl", "final_prompts", -16),
  ("rl", "size", 100_000),
  ("rl", "mesh.data", 0),
  ("pretrain", "crop", (48,)),
  ("pretrain", "crop", (100, 50)),
  ("pretrain", "unet.learning_rate", NAN),
  ("pretrain", "vae.iterations", -1),
  ("pretrain", "ema_decay", 1.0),
  ("pretrain", "test_share", 1.0),
  ("pretrain", "seed", -1),
  ("collect", "perturbed", -3),
  ("collect", "samples_per_prompt", 0),
  ("collect", "num_steps", 0),
  ("collect", "eta", NAN),
  ("collect", "fit", "stretch"),
  ("collect", "kinds.holes", NAN),
  ("collect", "num_prompts", -1),
  ("collect", "policies", ("",)),
  ("eval", "judges", ("mini", "")),
  ("eval", "gallery", -6),
  ("eval", "samples_per_prompt", 0),
  ("eval", "policy_step", "latest"),
  ("eval", "baseline_step", -1),
  ("eval", "eta", 1.5),
  ("eval", "dtype", "float64"),
  ("reward", "ridge", -1.0),
  ("reward", "ridge", NAN),
  ("reward", "norm_bound", -1.0),
  ("reward", "learning_rate", INF),
  ("reward", "network.dropout", 1.0),
  ("reward", "iterations", 0),
  ("reward", "trust.k", NAN),
  ("preferences", "test_share", -0.1),
  ("preferences", "weights.overall", NAN),
]


def config_of(name: str, **fields):
  preset = "" if name == "preferences" else "mini"
  return load_config(name, preset, **fields)


def one_line(error: pytest.ExceptionInfo) -> str:
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize(("name", "field", "value"), FIELDS, ids=lambda x: str(x)[:20])
def test_bad_field_is_refused_by_name_before_the_workdir_is_made(name, field, value, tmp_path):
  config = config_of(name)
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError) as error:
    COMMANDS[name](config, tmp_path / "run")
  message = one_line(error)
  assert message.startswith(f"config.{field} is ") and "; expected " in message
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_config_of_another_command_is_refused_before_the_workdir_is_made(name, tmp_path):
  given = "eval" if name == "rl" else "rl"
  with pytest.raises(ValueError) as error:
    COMMANDS[name](config_of(given), tmp_path / "run")
  message = one_line(error)
  assert f"prefpaint_jax.{NAMES[given]}" in message and f"configs/{name}.py" in message
  assert not (tmp_path / "run").exists()
  if name == "rl":  # `plan` takes the same file
    with pytest.raises(ValueError, match=r"config of prefpaint_jax\.evaluate"):
      stages.plan(config_of(given), jax.devices())


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"trust.minimum": 2.0, "trust.maximum": 1.0}, r"trust\.minimum is 2\.0; expected at most"),
    ({"train_timesteps": 9, "num_steps": 10}, "train_timesteps is 9; expected 1 to 8"),
    ({"updates_per_iteration": 3}, "updates_per_iteration is 3; expected a divisor"),
    ({"timesteps_per_pass": 3}, "timesteps_per_pass is 3; expected 0 or a divisor"),
    ({"skip_steps": (5, 5)}, r"skip_steps is \(5, 5\); expected a sum below num_steps=10"),
    ({"skip_steps": (9, 9)}, r"skip_steps is \(9, 9\); expected a sum below num_steps=10"),
  ],
)
def test_fields_that_do_not_fit_together_are_refused(fields, message):
  with pytest.raises(ValueError, match=message) as error:
    settings_from(config_of("rl", **fields))
  one_line(error)


@pytest.mark.parametrize("field", ["eval_prompts", "final_prompts"])
@pytest.mark.parametrize(
  ("number", "advice"), [(7, "lower num_samples=8, add prompts, or give 0"), (9, "give at most 8,")]
)
def test_more_prompts_than_there_are_name_a_number_that_works(field, number, advice):
  config = config_of("rl", num_samples=8, eval_every=1, **{field: 16})
  with pytest.raises(ValueError, match=f"{field} is 16, .* has {number} prompts .*; {advice}"):
    check_prompts(config, {field: number})


@pytest.mark.parametrize(("batch", "size"), [(24, 4), (16, 3)])
def test_passes_that_cut_the_samples_of_a_device_unevenly_are_refused(batch, size, tmp_path):
  config = config_of("rl", batch_size=batch, samples_per_prompt=2, samples_per_pass=size)
  message = (
    rf"\Asamples_per_pass is {size}; expected 0 or a divisor of {batch // 4}, the samples .*"
  )
  with pytest.raises(ValueError, match=message) as error:
    train.train(config, tmp_path / "run")
  one_line(error)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("collect", {"batch_size": 10**6, "size": 8192}),
    ("eval", {"batch_size": 10**6, "samples_per_prompt": 10**4, "policy": "mini"}),
  ],
)
def test_batch_beyond_the_memory_is_refused_before_the_workdir_is_made(name, fields, tmp_path):
  with pytest.raises(
    ValueError, match=r"config\.batch_size=1000000 .* needs about .* GiB"
  ) as error:
    COMMANDS[name](config_of(name, **fields), tmp_path / "run")
  one_line(error)
  assert not (tmp_path / "run").exists()


def test_collection_of_no_prompts_is_refused(tmp_path):
  config = config_of("collect", num_prompts=0, num_test_prompts=0)
  with pytest.raises(ValueError, match=r"num_prompts and config\.num_test_prompts are 0"):
    collect.collect(config, tmp_path / "run")


# ------------------------------------------------------------------------------------------- flags
# Every command line runs in a fork of one process that has imported the modules.
RUN_ALL = """
import json, os, runpy, sys, tempfile
import prefpaint_jax.train, prefpaint_jax.runtime.checkpoint
import orbax.checkpoint, PIL.Image, scipy.ndimage, tqdm, matplotlib
from prefpaint_jax.runtime import waiting
waiting.DELAY = 3600  # on a busy machine a refusal may take longer than the delay of a line
answers = []
for module, *arguments in json.load(sys.stdin):
  with tempfile.TemporaryFile("w+") as printed:
    sys.stdout.flush()
    child = os.fork()
    if not child:
      os.dup2(printed.fileno(), 1)
      os.dup2(printed.fileno(), 2)
      sys.argv = [module, *arguments]
      sys.modules.pop("prefpaint_jax." + module, None)
      try:
        runpy.run_module("prefpaint_jax." + module, run_name="__main__", alter_sys=True)
        status = 0
      except SystemExit as error:
        if isinstance(error.code, str):
          print(error.code, file=sys.stderr)
        status = 1 if isinstance(error.code, str) else error.code or 0
      except BaseException:
        import traceback
        traceback.print_exc()
        status = 2
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    printed.seek(0)
    answers.append([status, printed.read()])
json.dump(answers, sys.stdout)
"""
RL = "--config=configs/rl.py:mini"
INPAINT = ("inpaint", "--image=x.png", "--mask=x.png", "--output=o.png")
MASKS = ("data.masks", "--image=x.png", "--output=o.png")
PREFERENCES = ("data.preferences", "--config=configs/preferences.py", "--config.source=x")
LINES = [  # TMP is the folder of `answers`
  ((*INPAINT, "--eta=nan"), "--eta=nan: expected a number from 0 to 1"),
  ((*INPAINT, "--eta=1.5"), "--eta=1.5: expected"),
  ((*INPAINT, "--guidance_scale=nan"), "--guidance_scale=nan: expected a number from 1 to 1000"),
  ((*INPAINT, "--guidance_scale=1e30"), "--guidance_scale=1e30: expected"),
  ((*INPAINT, "--seed=-1"), "--seed=-1: expected an integer from 0 to 4294967295"),
  ((*INPAINT, f"--seed={2**64}"), "--seed=.*: expected an integer"),
  ((*INPAINT, "--num_samples=0"), "--num_samples=0: expected an integer from 1"),
  ((*INPAINT, "--num_steps=0"), "--num_steps=0: expected"),
  ((*INPAINT, "--num_steps=2.5"), "--num_steps=2.5: expected an integer"),
  ((*INPAINT, "--dtype=float64"), "--dtype=float64: .*float32"),
  ((*INPAINT, "--views=-1"), "--views=-1: expected"),
  ((*MASKS, "--size=1"), "--size=1: expected an integer from 2"),
  ((*MASKS, "--size=1000000"), "--size=1000000: expected"),
  ((*MASKS, "--number=0"), "--number=0: expected"),
  ((*MASKS, "--seed=-1"), "--seed=-1: expected"),
  (("annotate", "--candidates=x", "--noise=nan"), "--noise=nan: expected a number from 0"),
  (("annotate", "--candidates=x", "--noise=-1"), "--noise=-1: expected"),
  (("annotate", "--candidates=x", "--annotators=0"), "--annotators=0: expected"),
  (("annotate", "--candidates="), "--candidates=: expected a name or path"),
  (("label", "--candidates="), "--candidates=: expected a name or path"),
  (("label", "--candidates=x", "--per_prompt=0"), "--per_prompt=0: expected an integer from 1"),
  (("label", "--candidates=x", "--repeats=nan"), "--repeats=nan: expected a number from 0 to 1"),
  (("label", "--candidates=x", "--port=65536"), "--port=65536: expected an integer from 0"),
  (("label", "--candidates=x", "--mode=stars"), "--mode=stars: .*scores.*pairs"),
  (("label", "--candidates=x"), "x: no such folder; give the --workdir of"),
  (("label", "--candidates=TMP", "--host=0.0.0.0"), "--host=0.0.0.0 .*; give --annotators=FILE"),
  (("label", "--candidates=TMP", "--host="), "--host=: expected a name or path"),
  (("label", "--candidates=x", "--annotators="), "--annotators=: expected a name or path"),
  (("label", "--candidates=TMP", "--order=uncertain"), "--reward=FOLDER"),
  (("label", "--candidates=TMP", "--reward=mini"), "--order=uncertain and --reward=FOLDER"),
  (("label", "--candidates=TMP"), "no candidates to show; run prefpaint_jax.collect first"),
  (("label", "--candidates=TMP", "--report"), "annotations.jsonl: no such file; score"),
  (("export", "--workdir=", "--output=x"), "--workdir=: expected a name or path"),
  (("export", "--workdir=x", "--output="), "--output=: expected a name or path"),
  (("export", "--workdir=x", "--output=y", "--step=last"), "--step=last: expected an iteration"),
  (("export", "--workdir=x", "--output=y", "--lora=webui"), "--lora=webui: .*diffusers.*kohya"),
  (("export", "--workdir=x", "--output=TMP/mask.png", "--lora=kohya"), "mask.png is not a folder"),
  (("plot", "--workdir=", "--output=x.png"), "--workdir=: expected a name or path"),
  (("plot", "--workdir=x", "--output=x.png", "--smooth=0"), "--smooth=0: expected"),
  (("plot", "--workdir=x", "--output=x.png", "--only=("), r"--only=\(: expected a regular"),
  (("plot", "--workdir=x", "--output=x.png", "--reach=a=nan"), "--reach is a=nan"),
  (("benchmark", RL, "--repeats=0"), "--repeats=0: expected"),
  (("benchmark", RL, "--peak_tflops=nan"), "--peak_tflops=nan: expected a number above 0"),
  (("benchmark", "--config=configs/eval.py"), r"config of prefpaint_jax\.evaluate"),
  (("testing", "--output="), "--output=: expected a name or path"),
  (("train", RL, "--workdir="), "--workdir=: expected a name or path"),
  (("train", "--config=nowhere.py", "--workdir=x"), "--config=nowhere.py: no such file"),
  (("train", "--config=configs", "--workdir=x"), "--config=configs: no such file"),
  (
    (
      "inpaint",
      *("--model=TMP/a_1.png", "--image=TMP/a_1.png", "--mask=TMP/mask.png", "--output=TMP/o.png"),
    ),
    "--model=.*a_1.png: an image; expected a model",
  ),
  (("train", "--config=configs/rl.py:mni", "--workdir=x"), "mni: .* mean configs/rl.py:mini"),
  (("train", RL, "--workdir=x", "--config.trust=3"), "trust is a section .* --config.trust.b"),
  (("evaluate", "--config=configs/none.py", "--workdir=x"), "no such file; .* configs/eval.py"),
  (
    ("train", "--config=configs/rl.py:huge", "--workdir=x"),
    "rl.py:huge: no such preset; give one of mini, released",
  ),
  *[
    (("inpaint", "--image=TMP/a_1.png", "--mask=TMP/mask.png", *arguments), message)
    for arguments, message in (
      (["--output=TMP/a_1.png"], "a_1.png is the file that --image names; .* give another name"),
      (["--output=TMP/mask.png"], "mask.png is the file that --mask names"),
      (["--output=TMP/link.png"], "link.png is the file that --image names"),
      (["--output=TMP/a.png", "--num_samples=2"], "a_1.png is the file that --image names"),
      (["--output=TMP/folder.png"], "folder.png is a folder; expected a file"),
      (["--output=TMP/mask.png/x.png"], "mask.png is not a folder"),
    )
  ],
  (("data.masks", "--image=TMP/a_1.png", "--output=TMP/a_1.png"), "is the file that --image names"),
  (("data.masks", "--image=TMP/a_1.png", "--output=TMP"), "is a folder; expected a file"),
  (("plan", "--config=TMP/config.py", "--output=TMP/config.py"), "is the file that --config names"),
  (("benchmark", RL, "--output=TMP"), "is a folder; expected a file"),
  (("plan", RL, "--output=/dev/null"), "/dev/null is not a regular file"),
  (("plan", RL, "--output=/proc/x.json"), "takes no files"),
  (("plot", "--workdir=x", "--output=TMP/folder.png"), "folder.png is a folder; expected a file"),
  (("plot", "--workdir=x", "--output=/proc/x/y.png"), "takes no files"),
  (("export", "--workdir=x", "--output=TMP/mask.png"), "mask.png is a file; expected a folder"),
  (("export", "--workdir=x", "--output=TMP"), "is not empty, it has 0.py"),
  (("export", "--workdir=x", "--output=/proc/x"), "takes no files"),
  (("testing", "--output=TMP/mask.png/x"), "mask.png is not a folder"),
  ((*PREFERENCES, "--workdir=/proc/x"), "takes no files"),
  ((*PREFERENCES, "--workdir=TMP/loop"), "loop is not a folder"),
  (("train", RL, "--workdir=x", "--config.seed=-1"), r"config\.seed is -1; expected"),
  (("train", RL, "--workdir=x", "--config.skip_steps=3"), r"config\.skip_steps is \(3,\)"),
]
LINES += [
  (("train", "--lr=1"), r"--lr: no such option; did you mean --config\.learning_rate\?"),
  (
    ("train", RL, "--workdir=x", "--seed=1"),
    r"--seed: .*mean --config\.seed\?",
  ),
  (
    ("train", RL, "--workdir=x", "--config.lr=1"),
    r"lr: .* mean --config\.learning_rate\?",
  ),
  (("train", RL, "--workdir=x", "--config.bananas=1"), "bananas: no such field; --help lists"),
  (("plot", "--bananas"), "--bananas: no such option; --help lists the options"),
  (("train", RL), r"give --workdir=\.\.\.; --help explains the options"),
]
FILE = "README.md"  # where a folder is expected
WORK, PREFERENCES = "--workdir=x", "--config=configs/preferences.py"
LINES += [
  ((*arguments, f"--{flag}={FILE}"), f"{FILE}.* file.*; {wanted}")
  for *arguments, flag, wanted in (
    ("train", RL, WORK, "config.policy", "expected a checkpoint"),
    ("train", RL, WORK, "config.prompts", "give 'mini', a folder"),
    ("plan", RL, "config.policy", "expected a checkpoint"),
    ("annotate", "candidates", "expected a folder; give the --workdir of"),
    ("label", "candidates", "expected a folder; give the --workdir of"),
    ("export", "--output=x", "workdir", "expected a folder; give the --workdir of a run"),
    ("plot", "--output=x.png", "workdir", "expected a folder; give the --workdir of a run"),
    ("data.preferences", PREFERENCES, WORK, "config.source", "expected a folder; give a folder"),
    ("train_reward", "--config=configs/reward.py", WORK, "config.preferences", "expected a folder"),
    ("collect", "--config=configs/collect.py:mini", WORK, "config.pictures", "give a folder"),
  )
]
HELP = [  # command, config file of its page
  *((command, f"configs/{file}.py") for file, (_, names) in CONFIGS.items() for command in names),
  *(
    (command, None) for command in ("annotate", "data.masks", "export", "inpaint", "label", "plot")
  ),
]
CONFIG_FILES = {  # content of a config file: expected words, after its name
  "def get_config(preset=''):\n  return 1 / 0\n": ", line 2: ZeroDivisionError: division by zero",
  "def get_config(:\n": ", line 1: invalid syntax",
  "import nothing_at_all\n": ", line 1: ModuleNotFoundError: No module named 'nothing_at_all'",
  "x = 1\n": ": no function get_config; expected one that returns a ConfigDict",
  "def get_config(preset=''):\n  pass\n": ": get_config returns NoneType; expected a ConfigDict",
  "def get_config(preset=''):\n  raise KeyError('a')\n": ", line 2: KeyError: 'a'",
  "x = 1\ny = '\0'\n": ", line 2: source code",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list:
  """The exit status and the output of each command line, then of each config file."""
  folder = tmp_path_factory.mktemp("configs")
  for name in ("a_1.png", "mask.png"):
    (folder / name).write_text(name)
  (folder / "config.py").write_text((ROOT / "configs" / "rl.py").read_text())
  (folder / "link.png").symlink_to("a_1.png")
  (folder / "loop").symlink_to("loop")
  (folder / "folder.png").mkdir()
  lines = [[x.replace("TMP", str(folder)) for x in arguments] for arguments, _ in LINES]
  for number, content in enumerate(CONFIG_FILES):
    (folder / f"{number}.py").write_text(content)
    lines.append(("data.preferences", f"--config={folder / f'{number}.py'}", "--workdir=x"))
  lines += [(command, "--help") for command, _ in HELP]
  lines += [("train", "-h", RL), ("train",)]
  done = subprocess.run(
    [sys.executable, "-c", RUN_ALL],
    input=json.dumps(lines),
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert all((folder / name).read_text() == name for name in ("a_1.png", "mask.png"))
  return json.loads(done.stdout)


@pytest.mark.parametrize("number", range(len(LINES)), ids=lambda i: " ".join(LINES[i][0])[-40:])
def test_bad_command_line_ends_with_one_line(number, answers):
  status, printed = answers[number]
  assert status == 1, printed
  assert re.fullmatch(f"error: .*{LINES[number][1]}.*\n", printed), printed


@pytest.mark.parametrize("number", range(len(CONFIG_FILES)))
def test_broken_config_file_is_named_with_the_line(number, answers):
  status, printed = answers[len(LINES) + number]
  assert status == 1, printed
  assert f"{number}.py{list(CONFIG_FILES.values())[number]}" in printed
  assert printed.startswith("error: ") and printed.count("\n") == 1


@pytest.mark.parametrize("number", range(len(HELP)), ids=lambda i: HELP[i][0])
def test_help_shows_usage_options_presets_and_every_field(number, answers):
  status, page = answers[len(LINES) + len(CONFIG_FILES) + number]
  command, file = HELP[number]
  assert status == 0, page
  assert f"\n  python -m prefpaint_jax.{command} --" in page
  assert "\nOptions:\n  --" in page
  assert max(map(len, page.splitlines())) <= 100
  if file:
    name = Path(file).stem
    fields = load_config(name).to_dict()
    leaves = re.findall(r"^  --config\.([a-z][\w.]+)=", page, re.MULTILINE)
    assert sorted(leaves) == sorted(leaves_of(fields))
    for preset in re.findall(r'preset == "(\w+)"', (ROOT / file).read_text()):
      assert re.search(rf"--config={file}:{preset} +\w", page)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_of_a_config_file_has_an_explanation(name):
  comments = help_pages.read_comments(ROOT / "configs" / f"{name}.py").fields
  for field in leaves_of(load_config(name).to_dict()):
    group = field.rpartition(".")[0]
    is_in_table = group and comments.get(group) and field not in comments  # ConfigDict({...})
    assert comments.get(field) or is_in_table, field


def leaves_of(tree, prefix=""):
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from leaves_of(value, f"{prefix}{name}.")
    else:
      yield prefix + name


def test_help_of_a_preset_has_its_values_with_the_comments_of_the_file(answers):
  status, page = answers[-2]
  assert status == 0
  assert "\nFields of configs/rl.py:mini:\n" in page
  assert re.search(r"\n  --config\.batch_size=16 +prompts per iteration, over all devices\n", page)
  assert "\n  Rollout.\n  --config.batch_size" in page


@pytest.mark.parametrize("arguments", [["help", "data.masks"], ["data.masks", "--help"]])
def test_help_of_a_command_is_its_page(arguments):
  done = subprocess.run(
    [sys.executable, "-m", "prefpaint_jax", *arguments], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout.startswith("Draws random masks") and "\nOptions:\n" in done.stdout


def test_a_command_without_arguments_prints_its_usage(answers):
  status, printed = answers[-1]
  assert status == 1
  assert printed.startswith("Aligns an inpainting model with a reward model.\n\n  python -m ")
  assert printed.endswith("\nRequired: --config, --workdir. --help explains every option.\n")


def test_the_list_of_commands_names_every_module_that_runs():
  done = subprocess.run(
    [sys.executable, "-m", "prefpaint_jax"], cwd=ROOT, capture_output=True, text=True, check=True
  )
  listed = re.findall(r"^  ([a-z_.]+)  +[A-Z]\w+s ", done.stdout, re.MULTILINE)
  package = ROOT / "prefpaint_jax"
  runs = [path for path in package.rglob("*.py") if "cli.run" in path.read_text()]
  runs = {".".join(path.relative_to(package).with_suffix("").parts) for path in runs}
  assert set(listed) == runs - {"runtime.cli"} | {"data.masks"}
  wrong = subprocess.run(
    [sys.executable, "-m", "prefpaint_jax", "trian"], cwd=ROOT, capture_output=True, text=True
  )
  assert wrong.returncode == 1
  assert wrong.stderr == "error: trian: no such command; did you mean train?\n"


def test_every_number_of_every_flag_has_a_range():
  unbounded = [
    f"{file.name}:{node.lineno}"
    for file in (ROOT / "prefpaint_jax").rglob("*.py")
    for node in ast.walk(ast.parse(file.read_text()))
    if isinstance(node, ast.Attribute) and node.attr in ("DEFINE_integer", "DEFINE_float")
  ]
  assert not unbounded, "use flags.DEFINE(within(RANGE), ...)"


# ---------------------------------------------------------------------------------- standard output
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_standard_output_is_named_and_not_the_workdir(unbuffered, tmp_path):
  code = "from prefpaint_jax.runtime import cli; cli.run_with_config(lambda *_: print('x' * 9999))"
  with Path("/dev/full").open("w") as full:
    done = subprocess.run(
      [sys.executable, "-c", code, "--config=configs/preferences.py", f"--workdir={tmp_path}"],
      cwd=ROOT,
      env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
      check=False,
    )
  assert done.returncode == 1
  assert done.stderr == (
    "error: standard output: No space left on device; make room, or write to another disk\n"
  )


@pytest.mark.parametrize(
  "work",
  [
    "numpy.zeros(2**50)",
    pytest.param("jax.numpy.zeros(2**45).block_until_ready()", marks=pytest.mark.slow),
  ],
)
def test_lack_of_memory_is_one_line(work):
  module = work.partition(".")[0]
  code = f"import {module}; from prefpaint_jax.runtime import cli; cli.run(lambda: {work})"
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 1
  assert re.fullmatch(r"error: out of memory \(.*\); give a smaller batch.*\n", done.stderr)
