"""Suggestions for unknown names: by alias, as a part of another name, or as a misspelling."""

import difflib
from collections.abc import Iterable

# What other programs call a field or an option -> names here; the first that a command has.
ALIASES: dict[str, tuple[str, ...]] = {
  "accum": ("gradient_accumulation",),
  "base": ("baseline", "policy"),
  "base_model": ("policy", "model"),
  "batch": ("batch_size",),
  "beta": ("kl_weight",),
  "bs": ("batch_size",),
  "cfg": ("guidance_scale",),
  "cfg_scale": ("guidance_scale",),
  "checkpoint": ("step", "policy_step"),
  "checkpointing_steps": ("checkpoint_every",),
  "compute_dtype": ("dtype",),
  "data": ("prompts", "pictures", "preferences", "source"),
  "data_dir": ("prompts", "pictures", "preferences", "source"),
  "dataset": ("prompts", "pictures", "preferences", "source"),
  "ddim_eta": ("eta",),
  "ema": ("ema_decay",),
  "epochs": ("num_iterations", "iterations"),
  "eps": ("adam_eps",),
  "epsilon": ("clip_range",),
  "eval_steps": ("eval_every", "judge_every"),
  "folder": ("workdir",),
  "grad_accum": ("gradient_accumulation",),
  "gradient_checkpointing": ("remat",),
  "image_size": ("size",),
  "images": ("pictures", "prompts", "image"),
  "input": ("image", "source"),
  "iters": ("num_iterations", "iterations"),
  "judge": ("judges", "reward"),
  "lambda": ("ridge",),
  "learn_rate": ("learning_rate", "unet.learning_rate"),
  "logdir": ("workdir",),
  "lora_rank": ("lora.rank",),
  "lr": ("learning_rate", "unet.learning_rate"),
  "max_grad_norm": ("clip_norm",),
  "max_steps": ("num_iterations", "iterations"),
  "max_train_steps": ("num_iterations", "iterations"),
  "mixed_precision": ("dtype",),
  "model": ("policy", "policies"),
  "num_epochs": ("num_iterations", "iterations"),
  "num_images": ("num_samples", "batch_size"),
  "num_images_per_prompt": ("num_samples", "samples_per_prompt"),
  "num_inference_steps": ("num_steps",),
  "num_train_epochs": ("num_iterations", "iterations"),
  "num_train_steps": ("num_iterations", "iterations"),
  "opt": ("optimizer",),
  "optim": ("optimizer",),
  "out": ("output", "workdir"),
  "output_dir": ("workdir", "output"),
  "photo": ("image",),
  "photos": ("pictures",),
  "precision": ("dtype",),
  "prompt": ("text", "prompts"),
  "resolution": ("size",),
  "resolutions": ("size",),
  "reward_model": ("reward", "judges"),
  "save_every": ("checkpoint_every",),
  "save_steps": ("checkpoint_every",),
  "samples": ("num_samples", "samples_per_prompt"),
  "scale": ("guidance_scale",),
  "temperature": ("eta",),
  "train_batch_size": ("batch_size",),
  "unet": ("policy",),
  "warmup": ("warmup_updates", "warmup_iterations"),
  "warmup_steps": ("warmup_updates", "warmup_iterations"),
  "wd": ("weight_decay",),
}

CUTOFF = 0.75  # of difflib's ratio; below it names have little in common
SHORTEST = 3  # letters of a name that is looked for inside others


def suggest(name: str, known: Iterable[str]) -> str | None:
  """Returns the known name that is meant by an unknown one, or None if none is likely.

  The known name may have more parts (`rank` -> `lora.rank`). Its own words and aliases come first,
  then names that contain it or that it contains, and then misspellings.
  """
  name, known = name.lower().replace("-", "_"), sorted(known, key=lambda other: (len(other), other))
  last = name.rpartition(".")[2]
  for wanted in (name, *ALIASES.get(name, ()), last, *ALIASES.get(last, ())):
    for other in known:
      if other == wanted or other.endswith(f".{wanted}"):
        return other
  ratio = lambda other: difflib.SequenceMatcher(None, last, other.rpartition(".")[2]).ratio()
  inside = lambda one, other: len(one) >= SHORTEST and one in other
  alike = [x for x in known if inside(last, x) or inside(x, last) or ratio(x) >= CUTOFF]
  return max(alike, key=ratio, default=None)
