"""Samples and scores one batch of an evaluation."""
# Shapes: b prompts of a batch, S samples of each, H W pixels, h w of a thumbnail.

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from prefpaint_jax.evaluation import drift as drift_lib
from prefpaint_jax.evaluation import fidelity, gallery, tables, witnesses
from prefpaint_jax.preference import simulation
from prefpaint_jax.rewards.reward import Reward


def examine(
  policies: Mapping[str, Callable[..., np.ndarray]],
  judges: Mapping[str, Reward],
  batch: Mapping[str, np.ndarray],
  key: jax.Array,
  config: ConfigDict,
  lpips: Callable[[np.ndarray, np.ndarray], Any] | None = None,
) -> dict[str, np.ndarray]:
  """Samples and scores one batch of prompts.

  Args:
    policies: inpainters by side: "policy", "baseline", and "rival0", ... if there are any.
    judges: rewards by label.
    batch: b prompts (see `examples.stack`).
    key: PRNG key, the same for all sides.
    config: the config of the command.
    lpips: LPIPS of images and others; None: not measured.

  Returns:
    SIDE/score/JUDGE [b, S], SIDE/measure/NAME [b, S], SIDE/measure/diversity [b],
    SIDE/witness/NAME [b, S, ...], SIDE/fidelity/NAME [b, S], SIDE/picture [b, h, w, 3] (thumbnails
    of the first samples), id, kind, complete and text [b], truth [b, 12] (moments of the images),
    prompt and original [b, h, w, 3].
  """
  S = config.samples_per_prompt
  images, masks = batch["image"], batch["mask"]
  repeated_images, repeated_masks = (np.repeat(x, S, axis=0) for x in (images, masks))
  results = {
    "id": batch["id"],
    "kind": batch["kind"],
    "complete": batch["complete"],
    "text": batch["text"],
    "truth": witnesses.measure(images, masks, images)["moments"],
    "prompt": np.stack([gallery.thumbnail(*pair) for pair in zip(images, masks, strict=True)]),
    "original": np.stack([gallery.thumbnail(image) for image in images]),
  }
  sampler = {name: config[name] for name in ("num_steps", "eta", "guidance_scale")}
  if config.protocol or config.blended:
    sampler["paste_back"] = False  # the known pixels of the samples count
  by_prompt = lambda x: np.asarray(x).reshape(-1, S, *np.shape(x)[1:])
  texts = batch["text"].tolist()
  for side, policy in policies.items():
    samples = policy(images, masks, key=key, text=texts, num_samples=S, **sampler)
    if config.blended:
      samples = fidelity.blend(samples, repeated_masks, repeated_images, config.protocol)
    if config.protocol == fidelity.BRUSHNET:
      samples = fidelity.through_jpeg(samples)
    features = None
    for label, judge in judges.items():
      rewards, z = judge.score(samples, images * (1.0 - masks), masks, texts)
      if features is None and z is not None:
        features = by_prompt(z)
      results[f"{side}/score/{label}"] = by_prompt(rewards)
    if config.simulated_preference:
      repeated_texts = np.repeat(texts, S).tolist()
      truth = simulation.true_preference(samples, repeated_masks, repeated_texts)["combined"]
      results[f"{side}/score/{tables.SIMULATED}"] = by_prompt(truth)
    measures = drift_lib.measure(samples, repeated_masks, repeated_images)
    results |= {f"{side}/measure/{name}": by_prompt(values) for name, values in measures.items()}
    found = witnesses.measure(samples, repeated_masks, repeated_images)
    results |= {f"{side}/witness/{name}": by_prompt(values) for name, values in found.items()}
    kept = fidelity.measure(samples, repeated_masks, repeated_images, config.protocol, lpips)
    results |= {f"{side}/fidelity/{name}": by_prompt(values) for name, values in kept.items()}
    if features is not None:
      results[f"{side}/measure/diversity"] = drift_lib.diversity(features)
    results[f"{side}/picture"] = np.stack([gallery.thumbnail(image) for image in samples[::S]])
  return results
