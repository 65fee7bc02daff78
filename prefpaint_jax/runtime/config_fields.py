"""The range of every field of every config; `config_check` checks a config against them.

A name that ends in ".*" gives the range of all fields below it, whose names are the user's.
"""

from prefpaint_jax.runtime.ranges import (
  Boolean,
  Choice,
  Integer,
  Number,
  Optional,
  Range,
  Several,
  Step,
  Text,
)

# Ranges that several configs, flags and arguments of Python functions share.
# JAX would keep only the last 32 bits of a larger seed, so that two seeds would draw the same.
SEED = Integer(0, 2**32 - 1)
COUNT = Integer(1, 10**6)
COUNT_OR_NONE = Integer(0, 10**9)
NUM_STEPS = Integer(1, 1000)
ETA = Number(0, 1)  # beyond 1 the variance of a DDIM step is larger than the variance to reach
GUIDANCE_SCALE = Number(1, 1000)  # diffusers uses no guidance below 1
DTYPE = Choice(("float32", "bfloat16"))
SIZE = Integer(1, 8192)  # pixels of a side
SHARE = Number(0, 1)
WEIGHT = Number(0, 1e6)
RATE = Number(0, 1)  # learning rate
DECAY = Number(0, 1, excluded=(1,))  # of a moving average
NAME = Text()  # a folder, hub name or ""; commands say what an empty one needs
TRUST_K = Number(0, 1e12)
TRUST_B = Number(-50, 50)  # exp(50) is far below float32's largest number
BOUND = Optional(Number(0, 1e12, excluded=(0,)))  # R or S of the reward's error bound
AXIS = Integer(1, 2**20, also=(-1,))  # size of a mesh axis
CROP = Several(Integer(1, 2**20), 2, rising=True)

# Arguments of `Inpainter`.
ARGUMENTS: dict[str, Range] = {
  "num_steps": NUM_STEPS,
  "eta": ETA,
  "guidance_scale": GUIDANCE_SCALE,
  "num_samples": COUNT,
  "paste_back": Boolean(),
  "remat": Boolean(),
}

# Values that the code names too.
ALGORITHMS = ("ppo", "nft", "awm")
COMBINATIONS = ("sum", "gdpo", "winrate")
TRUST_NORMS = ("mahalanobis", "released", "novelty", "ensemble", "constant", "none")
KINDS = ("outpainting", "warping", "box", "brush")
FITS = ("crop", "pad", "random")
PROTOCOLS = ("brushnet",)
AUGMENTATIONS = ("none", "mirror", "dihedral")

RL: dict[str, Range] = {
  "seed": SEED,
  "num_iterations": COUNT_OR_NONE,
  "dtype": DTYPE,
  "policy": NAME,
  "reward": NAME,
  "combine": Choice(COMBINATIONS),
  "bound": NAME,
  "prompts": NAME,
  "size": SIZE,
  "batch_size": COUNT,
  "samples_per_prompt": Integer(1, 10**4),
  "num_steps": NUM_STEPS,
  "eta": ETA,
  "window": Integer(0, 1000),
  "window_iterations": COUNT,
  "guidance_scale": GUIDANCE_SCALE,
  "text_dropout": SHARE,
  "samples_per_pass": COUNT_OR_NONE,
  "decode_batch": COUNT_OR_NONE,
  "behaviour_refresh": COUNT,
  "behaviour_dtype": DTYPE,
  "mask_latents": Choice(("cells", "corner")),
  "vae_posterior": Choice(("mean", "sample")),
  "trust.norm": Choice(TRUST_NORMS),
  "trust.reference": Integer(0, 2**20),
  "trust.k": TRUST_K,
  "trust.b": TRUST_B,
  "trust.minimum": Optional(WEIGHT),
  "trust.maximum": Optional(Number(0, 1e6, excluded=(0,))),
  "trust.constant": Number(0, 1e6, excluded=(0,)),
  "advantage_clip": Number(0, 1e6, excluded=(0,)),
  "advantage_std": Choice(("batch", "group")),
  "max_nan_fraction": SHARE,
  "algorithm": Choice(ALGORITHMS),
  "ratio_normalisation": Boolean(),
  "nft.beta": Number(0, 100, excluded=(0,)),
  "nft.decay_start": COUNT_OR_NONE,
  "nft.decay_rate": SHARE,
  "nft.decay_maximum": DECAY,
  "train_timesteps": NUM_STEPS,
  "skip_steps": Several(Integer(0, 1000), 2),
  "updates_per_iteration": NUM_STEPS,
  "timesteps_per_pass": Integer(0, 1000),
  "gradient_accumulation": COUNT,
  "optimizer": Choice(("adamw", "sgd")),
  "learning_rate": RATE,
  "warmup_updates": COUNT_OR_NONE,
  "clip_range": Number(0, 1000, excluded=(0,)),
  "log_prob_region": Choice(("all", "hole")),
  "loss_reduction": Choice(("mean", "sum")),
  "kl_weight": WEIGHT,
  "ema_decay": DECAY,
  "adam_b1": DECAY,
  "adam_b2": DECAY,
  "adam_eps": Number(0, 1, excluded=(0,)),
  "weight_decay": Number(0, 1000),
  "moments_dtype": DTYPE,
  "clip_norm": Optional(Number(0, 1e6, excluded=(0,))),
  "remat": Boolean(),
  "lora.init": NAME,
  "lora.rank": Integer(0, 1024),
  "lora.targets": Text(empty=False, pattern=True),
  "mesh.data": AXIS,
  "mesh.fsdp": AXIS,
  "mesh.split_frozen": Boolean(),
  "checkpoint_every": COUNT_OR_NONE,
  "keep_checkpoints": COUNT,
  "keep_best": Text(),
  "judges": Several(Text(empty=False)),
  "stop_on_hacking": Boolean(),
  "sample_every": COUNT_OR_NONE,
  "num_samples": COUNT,
  "eval_every": COUNT_OR_NONE,
  "eval_prompts": Integer(0, 10**6),
  "final_prompts": Integer(0, 10**6),
  "simulated_preference": Boolean(),
}

DPO: dict[str, Range] = {
  **{name: RL[name] for name in RL if name.startswith(("adam_", "lora."))},
  "seed": SEED,
  "num_iterations": Integer(1, 10**9),
  "dtype": DTYPE,
  "policy": NAME,
  "preferences": NAME,
  "pairs": Choice(("extremes", "all")),
  "size": SIZE,
  "batch_size": COUNT,
  "mask_latents": RL["mask_latents"],
  "loss": Choice(("dpo", "capo")),
  "beta": Number(0, 1e9, excluded=(0,)),
  "region": Choice(("all", "hole", "masked")),
  "reward": NAME,
  "trust.norm": Choice(("mahalanobis", "released", "none")),
  "trust.k": TRUST_K,
  "trust.b": TRUST_B,
  "trust.minimum": RL["trust.minimum"],
  "trust.maximum": RL["trust.maximum"],
  "gradient_accumulation": COUNT,
  "optimizer": RL["optimizer"],
  "learning_rate": RATE,
  "warmup_updates": COUNT_OR_NONE,
  "ema_decay": DECAY,
  "weight_decay": RL["weight_decay"],
  "moments_dtype": DTYPE,
  "clip_norm": RL["clip_norm"],
  "remat": Boolean(),
  "mesh.data": AXIS,
  "mesh.fsdp": AXIS,
  "checkpoint_every": Integer(1, 10**9),  # the last checkpoint is the result
  "judge_every": COUNT_OR_NONE,
  "log_every": COUNT_OR_NONE,
}

PRETRAIN: dict[str, Range] = {
  "seed": SEED,
  "dtype": DTYPE,
  "policy": NAME,
  "pictures": NAME,
  "test_share": Number(0, 1, excluded=(1,)),
  "size": SIZE,
  "crop": CROP,
  "faded_share": SHARE,
  "vae.iterations": COUNT_OR_NONE,
  "vae.batch_size": COUNT,
  "vae.learning_rate": RATE,
  "vae.kl_weight": WEIGHT,
  "unet.iterations": COUNT_OR_NONE,
  "unet.batch_size": COUNT,
  "unet.learning_rate": RATE,
  "warmup_iterations": COUNT_OR_NONE,
  "ema_decay": DECAY,
  "remat": Boolean(),
  "mesh.data": AXIS,
  "mesh.fsdp": AXIS,
  "checkpoint_every": COUNT_OR_NONE,
  "log_every": COUNT_OR_NONE,
}

COLLECT: dict[str, Range] = {
  "seed": SEED,
  "dtype": DTYPE,
  "pictures": NAME,
  "num_prompts": Integer(0, 10**7),
  "num_test_prompts": Integer(0, 10**7),
  "size": SIZE,
  "fit": Choice(FITS),
  "crop": CROP,
  "test_share": SHARE,
  "kinds.*": WEIGHT,
  "policies": Several(Text(empty=False)),
  "samples_per_prompt": Integer(1, 10**4),
  "num_steps": NUM_STEPS,
  "eta": ETA,
  "guidance_scale": GUIDANCE_SCALE,
  "batch_size": COUNT,
  "perturbed": Integer(0, 10**4),
  "rewards": Several(Text(empty=False)),
}

PREFERENCES: dict[str, Range] = {
  "source": NAME,
  "rewards": Text(),
  "weights.*": WEIGHT,
  "test_share": SHARE,
}

REWARD: dict[str, Range] = {
  "seed": SEED,
  "dtype": DTYPE,
  "preferences": NAME,
  "size": Integer(0, 8192),
  "augmentation": Choice(AUGMENTATIONS),
  "simulated_preference": Boolean(),
  "clip": NAME,
  "frozen_share": SHARE,
  "network.fusion": Choice(("late", "early")),
  "network.differences": Boolean(),
  "network.num_tokens": Integer(1, 2),
  "network.activation": Choice(("identity", "gelu")),
  "network.num_heads": Integer(1, 1024),
  "network.feedforward_dim": Integer(1, 2**16),
  "network.hidden_dim": Integer(1, 2**16),
  "network.feature_dim": Integer(1, 2**14),
  "network.encoder_dropout": DECAY,
  "network.dropout": DECAY,
  "network.shift": Number(-1e6, 1e6),
  "network.scale": Number(0, 1e6, excluded=(0,)),
  "network.vision.hidden_size": Integer(1, 2**16),
  "network.vision.intermediate_size": Integer(1, 2**18),
  "network.vision.num_hidden_layers": Integer(1, 1000),
  "network.vision.num_attention_heads": Integer(1, 1024),
  "network.vision.image_size": SIZE,
  "network.vision.patch_size": SIZE,
  "network.vision.projection_dim": Integer(1, 2**16),
  "network.vision.hidden_act": Text(empty=False),
  "network.vision.layer_norm_eps": Number(0, 1),
  "iterations": Integer(1, 10**9),
  "batch_size": COUNT,
  "learning_rate": RATE,
  "warmup_iterations": COUNT_OR_NONE,
  "weight_decay": Number(0, 1000),
  "score_weight": WEIGHT,
  "pair_weight": WEIGHT,
  "ema_decay": DECAY,
  "whiten": Boolean(),
  "ridge": Number(0, 1e12),
  "noise_scale": BOUND,
  "norm_bound": BOUND,
  "trust.k": TRUST_K,
  "trust.b": TRUST_B,
  "mesh.data": AXIS,
  "mesh.fsdp": AXIS,
  "checkpoint_every": COUNT_OR_NONE,
  "judge_every": COUNT_OR_NONE,
  "log_every": COUNT_OR_NONE,
}

EVAL: dict[str, Range] = {
  "seed": SEED,
  "dtype": DTYPE,
  "policy": NAME,
  "policy_step": Optional(Step()),
  "baseline": NAME,
  "baseline_step": Optional(Step()),
  "rivals": Several(Text(empty=False)),
  "judges": Several(Text(empty=False)),
  "simulated_preference": Boolean(),
  "prompts": NAME,
  "split": Text(),
  "kind": Choice((*KINDS, "")),
  "num_prompts": Integer(0, 10**7),
  "size": SIZE,
  "samples_per_prompt": Integer(2, 10**4),  # WinRate compares different seeds
  "num_steps": NUM_STEPS,
  "eta": ETA,
  "guidance_scale": GUIDANCE_SCALE,
  "batch_size": COUNT,
  "protocol": Choice((*PROTOCOLS, "")),
  "blended": Boolean(),
  "lpips": NAME,
  "gallery": Integer(0, 10**4),
}

# By file in configs/: the ranges, and the commands that take the file.
CONFIGS: dict[str, tuple[dict[str, Range], tuple[str, ...]]] = {
  "rl": (RL, ("train", "plan", "benchmark")),
  "dpo": (DPO, ("train_dpo",)),
  "pretrain": (PRETRAIN, ("pretrain",)),
  "collect": (COLLECT, ("collect",)),
  "preferences": (PREFERENCES, ("data.preferences",)),
  "reward": (REWARD, ("train_reward",)),
  "eval": (EVAL, ("evaluate",)),
}
