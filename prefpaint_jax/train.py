"""Aligns an inpainting model with a learned reward.

  python -m prefpaint_jax.train --config=configs/rl.py:mini --workdir=runs/mini

The workdir receives config.json, metrics.jsonl, TensorBoard events, pictures of the same held-out
prompts, and checkpoints; the same command resumes an interrupted run exactly. On other devices it
resumes as well, and the numbers then differ in their last bits.
"""
# Shapes: P prompts of an iteration, N held-out prompts, H W pixels.

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from prefpaint_jax import (
  alignment,
  app,
  comparison,
  diffusion,
  distributed,
  lora,
  metrics,
  sharding,
  simulation,
)
from prefpaint_jax.alignment import Frozen, TrainState
from prefpaint_jax.checkpoint import Checkpoints
from prefpaint_jax.data import prompts as prompt_io
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.optimizer import optimizer_from
from prefpaint_jax.programs import compile_iteration, make_programs
from prefpaint_jax.reward import RewardModel
from prefpaint_jax.settings import settings_from

KEEP_BEST = ("held_out/reward", "held_out/reward_winrate", "reward/mean")  # metrics to choose by


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
  """Collects SIGTERM and SIGINT instead of dying of them; a second one has its usual effect."""
  received: list[int] = []
  before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

  def note(number: int, _) -> None:
    received.append(number)
    signal.signal(number, before[number])

  for number in before:
    signal.signal(number, note)
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def check_keep_best(config: ConfigDict) -> None:
  """Refuses a metric that checkpoints would not have."""
  name, every = config.keep_best, config.eval_every
  if name not in ("", *KEEP_BEST):
    raise ValueError(f"keep_best is {name!r}: give one of {', '.join(KEEP_BEST)}, or none")
  is_measured = bool(config.eval_prompts and every) and config.checkpoint_every % every == 0
  if name.startswith("held_out/") and not is_measured:
    raise ValueError(
      f"keep_best={name} is measured every eval_every={every} iterations on "
      f"eval_prompts={config.eval_prompts}, checkpoints are written every "
      f"{config.checkpoint_every}: make checkpoint_every a multiple of eval_every"
    )


def train(config: ConfigDict, workdir: Path) -> TrainState:
  ### Settings: refuse what cannot work before anything is loaded.
  settings = settings_from(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  sharding.check_batch(config.batch_size, mesh)
  sharding.check_batch(config.num_samples, mesh, "num_samples")
  if not config.prompts:
    raise ValueError(
      "config.prompts is empty: give --config.prompts=FOLDER, or use the mini preset"
    )
  for field in ("eval_prompts", "final_prompts"):
    if config[field] % config.num_samples:
      raise ValueError(
        f"{field} {config[field]} does not divide by num_samples {config.num_samples}, which are "
        "painted at a time"
      )
  check_keep_best(config)
  process, processes = jax.process_index(), jax.process_count()
  is_writer = process == 0
  may_change = ("num_iterations", "keep_checkpoints", "keep_best")
  may_change += tuple(f"mesh.{name}" for name in config.mesh)
  app.open_workdir(config, workdir, free=may_change, is_writer=is_writer)

  ### Data: prompts to learn from, and the same held-out ones for every picture.
  loader = prompt_io.prompt_loader(
    prompt_io.open_prompts(config.prompts, "train", config.size),
    config.batch_size,
    config.seed,
    process,
    processes,
  )
  held_out = prompt_io.open_prompts(config.prompts, "test", config.size)

  ### Models: the policy, its reward and the bound on it. All arrays are arguments of the programs.
  policy = Inpainter.from_pretrained(config.policy, config.dtype, config.remat)
  judge = RewardModel.from_pretrained(config.reward, config.bound or None, config.dtype)
  if settings.trust.needs_bound and judge.bound is None:
    raise ValueError(
      f"trust.norm={settings.trust.norm!r} needs a bound, {config.reward} has none: give "
      "--config.bound=FILE or --config.trust.norm=none"
    )
  modules, network = policy.modules, judge.network
  modules.latent_shape(1, config.size, config.size)  # refuses a size that does not fit
  steps = diffusion.ddim_steps(modules.schedule, settings.num_steps, settings.eta)
  optimizer = optimizer_from(config)
  base = policy.params.pop("unet")
  # What is trained: all of the base's parameters, or adapters that begin as no change to it.
  begin = base
  if settings.lora:
    begin = lora.init(jax.random.key(config.seed), base, config.lora.rank, config.lora.targets)
  compares = bool(config.sample_every or config.eval_every or config.final_prompts)
  frozen = Frozen(
    vae=policy.params["vae"],
    reward=judge.params,
    whitening=None if judge.bound is None else judge.bound.whitening.astype(np.float32),
    context=policy.empty_context,
    base=base if settings.lora else None,
  )
  split, whole = sharding.DEFAULT_RULES, ((r"", P()),)
  place = lambda tree, rules: sharding.place(sharding.specs(tree, rules, mesh), tree)
  begin = place(begin, split)
  frozen = place(frozen, split if config.mesh.split_frozen else whole)
  if settings.kl_weight and not settings.lora:
    frozen = frozen._replace(base=begin)
  del policy, judge, base  # arrays of the host

  ### Programs: one per stage, each compiled once.
  programs = make_programs(modules, network, settings, steps, optimizer, mesh, begin)

  ### State: fresh, or exactly where an earlier run stopped.
  checkpoints = Checkpoints(workdir / "checkpoints", config.keep_checkpoints, config.keep_best)
  if checkpoints.latest() is None:
    state = programs.init(begin)
  else:
    abstract = jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      programs.shapes,
      programs.layout,
    )
    state, position, _ = checkpoints.restore(abstract)
    loader.set_state(position)
  begin = begin if compares else None  # to paint with
  start = int(state.iteration)
  writer = metrics.MetricsWriter(workdir, is_writer)
  writer.truncate(start)

  ### Pictures of held-out prompts, with the same noise every time.
  sample_key, comparison_key, loop_key = jax.random.split(jax.random.key(config.seed), 3)

  def held_out_batch(first: int) -> dict[str, np.ndarray]:
    indices = [(first + i) % len(held_out) for i in range(config.num_samples)]
    return prompt_io.stack([held_out[i] for i in indices])

  def paint_and_score(params, batch, key) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, 3] and rewards [N] of a batch that every process holds whole."""
    images, masks = sharding.place(sharding.batch_sharding(mesh), (batch["image"], batch["mask"]))
    painted = programs.paint(params, frozen, images, masks, key)
    rewards = judge_rewards(frozen.reward, painted, images * (1.0 - masks))
    return multihost_utils.process_allgather((painted, rewards), tiled=True)

  @jax.jit
  def judge_rewards(params, painted, masked_images):
    return alignment.reward.apply(network, params, painted, masked_images)[0]

  def current():
    """What `export` would write now."""
    return state.ema if settings.ema_decay else state.params

  sample_batch = held_out_batch(0)

  def write_sample(iteration: int) -> None:
    now = paint_and_score(current(), sample_batch, sample_key)
    if not is_writer:
      return
    # The hole is shown grey, apart from black.
    shown = np.where(sample_batch["mask"] > 0, 0.5, sample_batch["image"])
    labels = [""] * len(shown) + [f"{r:.2f}" for r in (*base_sample[1], *now[1])]
    grid = metrics.image_grid(
      np.concatenate([shown, base_sample[0], now[0]]),
      columns=len(shown),
      scale=max(1, 64 // config.size),
      labels=labels,
    )
    text = {"rows": "prompt, base, now", "iteration": str(iteration)}
    metrics.save_png(workdir / "samples" / f"{iteration:06d}.png", grid, text)
    writer.image(iteration, "samples", grid)

  ### Held-out prompts, painted by base and policy with the same noise, and judged.
  def judge_chunk(params, chunk: int) -> dict[str, np.ndarray]:
    """Scores and measures [N] of the chunk's prompts."""
    held = held_out_batch(chunk * config.num_samples)
    key = jax.random.fold_in(comparison_key, chunk)
    painted, rewards = paint_and_score(params, held, key)
    judged = {"reward": rewards}
    if config.simulated_preference:
      judged["true_preference"] = simulation.true_preference(painted, held["mask"])["combined"]
    return judged | comparison.measure(painted, held["mask"], held["image"])

  judge_base = functools.cache(lambda chunk: judge_chunk(begin, chunk))

  def compare(
    number: int, gives_up: Callable = bool
  ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None:
    """What `judge_chunk` says of the policy and of the base on the first `number` prompts.

    None where `gives_up()` turned true meanwhile.
    """
    ours, theirs = [], []
    for chunk in range(number // config.num_samples):
      if gives_up():
        return None
      ours.append(judge_chunk(current(), chunk))
      theirs.append(judge_base(chunk))
    join = lambda parts: {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return join(ours), join(theirs)

  def held_out_metrics() -> dict[str, float]:
    ours, theirs = compare(config.eval_prompts)
    line = {}
    for name, values in ours.items():
      is_score = name in ("reward", "true_preference")
      if is_score:
        line[f"held_out/{name}"] = float(np.mean(values))
        line[f"held_out/{name}_winrate"] = float(np.mean(comparison.wins(values, theirs[name])))
      else:
        line[f"held_out/drift/{name}"] = float(np.mean(values) - np.mean(theirs[name]))
    return line

  ### The loop. Each wait below is for work behind which the device already has more to do.
  images_per_iteration = config.batch_size * settings.samples_per_prompt
  bar = metrics.progress(config.num_iterations, start, visible=is_writer)
  late = None  # the update metrics of the iteration before, with what was known of it then
  done = saved = start

  def finish(
    iteration: int, known: dict, update_metrics: list, scored_at: float, evaluates: bool = False
  ) -> tuple[float, dict[str, float]]:
    """Waits for an iteration's update and writes its line; returns when it was done, and this."""
    collected = jax.device_get(update_metrics)
    done_at = time.perf_counter()
    line = dict(known)
    line |= {name: float(np.mean([m[name] for m in collected])) for name in collected[0]}
    line["time/update_s"] = done_at - scored_at
    line["time/iteration_s"] = line["time/rollout_s"] + line["time/update_s"]
    line["images_per_s"] = images_per_iteration / line["time/iteration_s"]
    line |= held_out_metrics() if evaluates else {}
    writer.write(iteration, line)
    bar.set_postfix_str(
      f"reward {line['reward/mean']:+.3f}, {line['images_per_s']:.1f} images/s", refresh=False
    )
    bar.update()
    return done_at, line

  with (
    stop_requests() as stop,
    contextlib.closing(checkpoints),
    contextlib.closing(writer),
    contextlib.closing(bar),
  ):
    if start < config.num_iterations:
      picture = lambda channels: jax.ShapeDtypeStruct(
        (config.batch_size, config.size, config.size, channels),
        np.float32,
        sharding=sharding.batch_sharding(mesh),
      )
      compile_iteration(programs, state, frozen, picture(3), picture(1))
    if config.sample_every:
      base_sample = paint_and_score(begin, sample_batch, sample_key)
    if start == 0 and config.sample_every:
      write_sample(0)
    updated_at = time.perf_counter()
    # A signal reaches one process; all stop after the same iteration, or chunk of prompts.
    asked_to_stop = lambda: stop if processes == 1 else distributed.any_process(bool(stop), mesh)
    stopping = False
    for iteration in range(start, config.num_iterations):
      rollout_key, timestep_key = jax.random.split(jax.random.fold_in(loop_key, iteration))
      stopping = asked_to_stop()
      batch = next(loader)
      images, masks = sharding.to_global(mesh, (batch["image"], batch["mask"]))
      behaviour = state.params if state.behaviour is None else state.behaviour
      prompts, trajectory, painted = programs.rollout(behaviour, frozen, images, masks, rollout_key)
      scores, score_metrics = programs.score(frozen, prompts, painted)
      # On one CPU programs run when they are called, elsewhere meanwhile.
      at_once = all(x.is_ready() for x in jax.tree.leaves(score_metrics))
      scored_at = time.perf_counter()
      if late is not None:
        updated_at, _ = finish(*late)
      update_metrics = []
      for indices in programs.draw_timesteps(timestep_key):
        state, one = programs.update(state, frozen, prompts, trajectory, scores, indices)
        update_metrics.append(one)
      state = programs.end_iteration(state)

      known = {name: float(value) for name, value in jax.device_get(score_metrics).items()}
      scored_at = scored_at if at_once else time.perf_counter()
      known["time/rollout_s"] = scored_at - updated_at
      late = iteration + 1, known, update_metrics, scored_at
      done = iteration + 1
      too_many_nan = known["reward/nan_fraction"] > config.max_nan_fraction
      last = too_many_nan or done == config.num_iterations
      # Not where a run happens to stop: a resumed one leaves the same as one that never did.
      is_due = lambda every, done=done, last=last: every and (done % every == 0 or last)
      evaluates = bool(config.eval_prompts and config.eval_every) and done % config.eval_every == 0
      if at_once or is_due(config.checkpoint_every) or is_due(config.sample_every) or evaluates:
        _, line = finish(*late, evaluates)
        late = None
        # A checkpoint says that all before it is written: it comes last.
        if is_due(config.sample_every):
          write_sample(done)
        if is_due(config.checkpoint_every):
          checkpoints.save(done, state, loader.get_state(), {}, line)
          saved = done
        updated_at = time.perf_counter()
      if last or stopping:
        break
    if late is not None:
      finish(*late)
    checkpoints.wait()
    if start < config.num_iterations and too_many_nan:
      raise ValueError(
        f"iteration {done}: {known['reward/nan_fraction']:.0%} of the rewards are not finite, "
        f"max_nan_fraction is {config.max_nan_fraction:.0%}; the run was stopped"
      )

    ### The result.
    compared = compare(config.final_prompts, asked_to_stop) if config.final_prompts else None
    if compared is None and (stopping or config.final_prompts):
      if saved != done:
        checkpoints.save(done, state, loader.get_state(), {})
        checkpoints.wait()
      if is_writer:
        print(f"stopped after iteration {done} and saved; the same command goes on")
      return state

  if compared is not None and is_writer:
    ours, theirs = compared
    print(f"{config.final_prompts} held-out prompts, policy against base, same noise:")
    titles = {"reward": "learned reward", "true_preference": "true preference"}
    for name in (name for name in titles if name in ours):
      print(comparison.describe(titles[name], ours[name], theirs[name]))
  return state


if __name__ == "__main__":
  app.run_with_config(train, several_processes=True)
