"""Aligns an inpainting model with a reward model.

  python -m prefpaint_jax.train --config=configs/rl.py:mini --workdir=runs/mini

Writes config.json, metrics.jsonl, TensorBoard events, samples of held-out prompts, and checkpoints
to the workdir. The same command resumes an interrupted run exactly; on other devices it resumes as
well, and results then differ in their last bits, because sums run in a different order.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from prefpaint_jax.align.held_out import HeldOut
from prefpaint_jax.align.loading import load_run
from prefpaint_jax.align.novelty import with_novelty
from prefpaint_jax.align.optimizer import counts_of_iteration
from prefpaint_jax.align.referee import Referee
from prefpaint_jax.align.results import (
  print_comparison,
  print_results,
  warn_of_trust,
  write_histograms,
  write_sample,
)
from prefpaint_jax.align.run import (
  Run,
  context_shapes,
  image_shapes,
  reward_shapes,
)
from prefpaint_jax.align.score import describe_unusable, reward_inputs
from prefpaint_jax.align.settings import (
  check_batch,
  check_config,
  check_prompts,
  check_workdir,
  compares_with_base,
  measures_novelty,
  settings_from,
)
from prefpaint_jax.align.stages import compile_iteration
from prefpaint_jax.align.state import (
  Experience,
  TrainState,
  behaviour_params,
  current_params,
)
from prefpaint_jax.data.prompts import final_split, open_prompts, prompt_loader
from prefpaint_jax.inpainter import open_policy
from prefpaint_jax.runtime import cli, sharding
from prefpaint_jax.runtime.checkpoint import Checkpoints
from prefpaint_jax.runtime.config_check import check_fields
from prefpaint_jax.runtime.finite import check_state
from prefpaint_jax.runtime.metrics import IterationLog, MetricsWriter
from prefpaint_jax.runtime.runs import base_step
from prefpaint_jax.runtime.signals import agreed_stop_requests
from prefpaint_jax.runtime.waiting import waiting
from prefpaint_jax.runtime.workdir import open_workdir

WRITES = ("checkpoints", "metrics.jsonl", "novelty.safetensors", "samples", "tensorboard")
# Fields that a resumed run may change; it may also change those that end in _every.
FREE = ("num_iterations", "samples_per_pass", "keep_checkpoints", "keep_best")


class Session(NamedTuple):
  """The parts of a run in progress."""

  config: ConfigDict
  workdir: Path
  mesh: Mesh
  run: Run
  loader: Any  # a grain iterator
  held_out: HeldOut
  final: HeldOut  # the same on the prompts of the comparison at the end
  checkpoints: Checkpoints
  writer: MetricsWriter
  log: IterationLog


def open_session(config: ConfigDict, workdir: Path, mesh: Mesh) -> tuple[Session, TrainState]:
  """Loads what a config names, and makes or restores the state."""
  settings = settings_from(config)
  process, processes = jax.process_index(), jax.process_count()

  ### Data, networks and their programs.
  prompts = open_prompts(config.prompts, "train", config.size)
  loader = prompt_loader(prompts, config.batch_size, config.seed, process, processes)
  prompts_of = {
    "eval_prompts": open_prompts(config.prompts, "test", config.size),
    "final_prompts": open_prompts(config.prompts, final_split(config.prompts), config.size),
  }
  check_prompts(config, {field: len(found) for field, found in prompts_of.items()})
  checkpoints = Checkpoints(workdir / "checkpoints", config.keep_checkpoints, config.keep_best)
  is_new = checkpoints.latest() is None
  with waiting(f"loading {config.policy} (reward: {config.reward})"):
    has_texts = any(found.has_texts for found in (prompts, *prompts_of.values()))
    step = base_step(config.policy, workdir, is_new)
    policy = open_policy(config.policy, config.dtype, step, config.remat)
    run = load_run(config, mesh, policy, has_texts)

  ### State: fresh, or exactly where an earlier run stopped.
  if is_new:
    state = run.stages.init(run.first_params(config))
  else:
    state, position, _ = checkpoints.restore(run.state_shapes)
    loader.set_state(position)
  sample_key, comparison_key, _ = jax.random.split(jax.random.key(config.seed), 3)
  if measures_novelty(settings.trust, run.objective):
    drawn = HeldOut(run, mesh, prompts, config.num_samples, sample_key, comparison_key)
    run = with_novelty(run, drawn, settings.trust.reference, workdir)
  run = run if compares_with_base(config) else run._replace(begin=None)
  start = int(state.iteration)
  writer = MetricsWriter(workdir, process == 0)
  # A run without a checkpoint writes the line of iteration 0 again.
  earlier = writer.truncate(start or -1)
  held_out, final = (
    HeldOut(
      run,
      mesh,
      found,
      config.num_samples,
      sample_key,
      comparison_key,
      config.simulated_preference,
      referee,
    )
    for found, referee in zip(prompts_of.values(), (Referee(earlier), None), strict=True)
  )
  images = config.batch_size * settings.samples_per_prompt
  counts = functools.partial(counts_of_iteration, config, images, settings.passes_per_sample)
  log = IterationLog(writer, config.num_iterations, start, images, counts)
  session = Session(config, workdir, mesh, run, loader, held_out, final, checkpoints, writer, log)
  return session, state


def iterate(
  session: Session, state: TrainState, asked_to_stop: Callable
) -> tuple[TrainState, int, bool]:
  """Runs the iterations that are left.

  Returns:
    The state, the iteration of the last checkpoint, and whether the run was asked to stop.
  """
  config, _, mesh, run, loader, held_out, _, checkpoints, _, log = session
  stages, frozen = run.stages, run.frozen
  loop_key = jax.random.split(jax.random.key(config.seed), 3)[2]
  shown = session.workdir, session.writer, held_out
  start = saved = int(state.iteration)
  stopping = failed = hacked = last_good = False
  if start < config.num_iterations:
    context = context_shapes(config, mesh, frozen) if run.has_texts else None
    read = reward_shapes(run.objective, config, mesh)
    compile_iteration(stages, state, frozen, *image_shapes(config, mesh), context, *read)
  if start == 0 and config.sample_every:
    with waiting(f"sampling {config.num_samples} held-out prompts"):
      write_sample(*shown, state)
  if start == 0 and config.eval_every and config.eval_prompts:
    with waiting(f"evaluating {config.eval_prompts} held-out prompts"):
      session.writer.write(0, held_out.metrics(current_params(state), config.eval_prompts, 0))
  log.restart_clock()
  for iteration in range(start, config.num_iterations):
    rollout_key, timestep_key = jax.random.split(jax.random.fold_in(loop_key, iteration))
    stopping = asked_to_stop()
    batch = next(loader)
    images, masks = sharding.to_global(mesh, (batch["image"], batch["mask"]))
    context = run.texts and run.texts(list(batch["text"]))
    behaviour, window = behaviour_params(state), stages.window(iteration)
    prompts, record, samples = stages.rollout(
      behaviour, frozen, images, masks, rollout_key, context, window
    )
    read = reward_inputs(run.objective, mesh, batch, samples)
    scores, score_metrics = stages.score(frozen, prompts, samples, *read)
    log.scored(score_metrics)
    experience, update_metrics = Experience(prompts, record, scores), []
    for indices in stages.draw_timesteps(timestep_key, window):
      state, metrics = stages.update(state, frozen, experience, indices)
      update_metrics.append(metrics)
    state = stages.end_iteration(state)

    done = iteration + 1
    score_line = log.updated(done, update_metrics)
    nan_fraction = score_line["reward/nan_fraction"]
    if iteration == 0 and session.writer.is_writer:
      warn_of_trust(config.trust, score_line)
    failed = nan_fraction > config.max_nan_fraction
    last = failed or done == config.num_iterations
    # Never due where a run is merely stopped: the resumed run must equal an uninterrupted one.
    is_due = lambda every, done=done, last=last: every and (done % every == 0 or last)
    samples_now, saves_now = is_due(config.sample_every), is_due(config.checkpoint_every)
    measures_now = config.eval_prompts and config.eval_every and done % config.eval_every == 0
    if log.synchronous or samples_now or saves_now or measures_now:
      measure = functools.partial(
        held_out.metrics, current_params(state), config.eval_prompts, done
      )
      line = log.flush(measure if measures_now else dict)
      if samples_now:
        write_sample(*shown, state)
        write_histograms(session.writer, done, scores)
      if saves_now:  # last: a checkpoint says that everything before it is written
        check_state(done, state)
        checkpoints.save(done, state, loader.get_state(), {}, line)
        saved = done
      log.restart_clock()
      if config.stop_on_hacking:  # process 0 has the lines of earlier iterations
        verdict = line.get("referee/hacking", 0.0), held_out.referee.last_good or 0
        hacked, last_good = multihost_utils.broadcast_one_to_all(np.array(verdict, np.int32))
    if last or stopping or hacked:
      break
  log.flush()
  check_state(int(state.iteration), state)
  checkpoints.wait()
  if failed or hacked:
    raise ValueError(why_ended(config, done, score_line, hacked, last_good))
  return state, saved, bool(stopping)


def why_ended(
  config: ConfigDict, done: int, line: Mapping[str, float], hacked: bool, last_good: int
) -> str:
  """Returns the line of a run that ends before its last iteration."""
  if hacked:
    kept = f"--step=best is the best checkpoint by {config.keep_best}"
    return (
      f"iteration {done}: the reward rises while a judge falls, so the run was stopped; the judge "
      f"was best at {f'iteration {last_good}: {kept}' if last_good else 'the base policy'}"
    )
  return (
    f"iteration {done}: {describe_unusable(line)}, max_nan_fraction is "
    f"{config.max_nan_fraction:.0%}; the run was stopped"
  )


def train(config: ConfigDict, workdir: Path) -> TrainState:
  """Aligns a policy as `config` says; resumes the run that `workdir` holds, if there is one."""
  check_fields(config, "rl")
  settings_from(config)  # raises ValueError for fields that cannot work together
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  check_batch(config, mesh)
  sharding.check_batch(config.num_samples, mesh, "num_samples")
  check_config(config)
  check_workdir(config, workdir)
  free = FREE + tuple(f"mesh.{name}" for name in config.mesh)
  is_writer = jax.process_index() == 0
  with open_workdir(config, workdir, "train", WRITES, free, is_writer=is_writer) as write_config:
    return _train(config, workdir, mesh, write_config)


def _train(
  config: ConfigDict, workdir: Path, mesh: Mesh, write_config: Callable[[], None]
) -> TrainState:
  """Aligns in a workdir that this process holds; see `train`."""
  session, state = open_session(config, workdir, mesh)
  multihost_utils.sync_global_devices("restored")  # a process that was refused has ended the run
  write_config()
  begun = int(state.iteration)
  if begun and begun >= config.num_iterations and session.writer.is_writer:
    print(
      f"{workdir}: finished after iteration {begun}, with metrics.jsonl, samples and checkpoints; "
      f"raise --config.num_iterations={config.num_iterations} to go on"
    )
  count, is_writer = config.final_prompts, session.writer.is_writer
  with (
    agreed_stop_requests(session.mesh) as asked_to_stop,
    contextlib.closing(session.checkpoints) as checkpoints,
    contextlib.closing(session.writer),
    contextlib.closing(session.log),
  ):
    state, saved, stopped = iterate(session, state, asked_to_stop)
    compared = None
    if count:
      with waiting(f"evaluating {count} held-out prompts, policy and base"):
        compared = session.final.compare(current_params(state), count, asked_to_stop)
    if compared is None and (stopped or count):
      done = int(state.iteration)
      if saved != done:
        checkpoints.save(done, state, session.loader.get_state(), {})
        checkpoints.wait()
      if is_writer:
        print(f"stopped after iteration {done} and saved; the same command goes on")
      return state

  if is_writer:
    if compared is not None:
      print_comparison(config, *compared)
    print_results(config, workdir, int(state.iteration))
  return state


if __name__ == "__main__":
  cli.run_with_config(train, several_processes=True)
