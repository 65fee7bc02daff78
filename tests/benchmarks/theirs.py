"""The stages of a benchmark, computed by PyTorch with the classes of diffusers and transformers.

Opponents:
  reference: computes as the released PrefPaint code does: guidance between two equal predictions in
    rollout and update, a copy of the policy for sampling, images for the reward model resized one
    by one with PIL, and a masked image embedded once for each of its samples.
  tuned: removes these costs: channels last, fused attention and AdamW, one batch for the reward
    model, images resized on the device, and no gradient where none is needed. It does not use
    torch.inference_mode, because an update cannot use tensors that were made in it.
  compiled: tuned, with every network in torch.compile.
All train one timestep per backward pass, and compute in the dtype of the config (bfloat16 by
autocast).
"""
# Shapes: as in `worlds`, but channels first.

import contextlib
import copy
import json
import math
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import worlds
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from worlds import World

# Otherwise diffusers advises in ten lines to install accelerate, for each network that it loads.
diffusers.utils.logging.set_verbosity_error()

OPPONENTS = ("reference", "tuned", "compiled")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Outputs = dict[str, Tensor | dict[str, Tensor]]


class Prompts(NamedTuple):
  """The prompts of B samples."""

  mask: Tensor  # [B, 1, H, W]
  masked_image: Tensor  # [B, 3, H, W]
  conditions: Tensor  # [B, 5, h, w], mask and masked latents


class Trajectory(NamedTuple):
  """The DDIM chain of a rollout."""

  latents: list[Tensor]  # T+1 of [B, 4, h, w]
  log_probs: list[Tensor]  # T of [B]


class Scores(NamedTuple):
  """Rewards of a batch of samples, and the weights of their losses."""

  reward: Tensor  # [B]
  trust: Tensor  # [B]
  advantages: Tensor  # [B]


class RewardNetwork(nn.Module):
  """The network of a reward folder: transformers' CLIP, torch's encoder layer, linear layers."""

  def __init__(self, config: dict):
    super().__init__()
    self.config = config
    self.is_early = config["fusion"] == "early"
    vision = config["vision"] | {"num_channels": 13 if self.is_early else 3}
    self.clip = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision))
    embedded = vision["projection_dim"] * (1 if self.is_early else 2)
    self.encoder_layer = nn.TransformerEncoderLayer(
      embedded // config["num_tokens"],
      config["num_heads"],
      config["feedforward_dim"],
      batch_first=True,
    )
    self.hidden = nn.Linear(embedded, config["hidden_dim"])
    self.features = nn.Linear(config["hidden_dim"], config["feature_dim"])
    self.last = nn.Linear(config["feature_dim"], 1, bias=False)
    black = (0.5 / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    self.register_buffer("black", black[:, None, None], persistent=False)

  @classmethod
  def from_pretrained(cls, folder: Path) -> "RewardNetwork":
    """Loads a reward folder."""
    self = cls(json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "model.safetensors")
    heads = {"mlp.layers.0": "hidden", "mlp.layers.2": "features", "mlp.last_layer": "last"}
    renamed = {}
    for name, tensor in tensors.items():
      module, leaf = name.rsplit(".", 1)
      if module.endswith("self_attn.q_proj") and module.startswith("encoder_layer"):
        fused = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
        renamed[f"encoder_layer.self_attn.in_proj_{leaf}"] = torch.cat(fused)
      elif not module.startswith("encoder_layer.self_attn") or module.endswith("out_proj"):
        renamed[f"{heads.get(module, module)}.{leaf}"] = tensor
    self.load_state_dict(renamed)
    return self.eval()

  def forward(self, pixels: Tensor, masked_pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Computes rewards [B] and features z [B, F].

    Args:
      pixels: normalised images [B, 3, H, W].
      masked_pixels: normalised masked images [B or B/S, 3, H, W].
    """
    batch = len(pixels)
    repeats = batch // len(masked_pixels)
    if self.is_early:
      masked_pixels = masked_pixels.repeat_interleave(repeats, 0)
      tokens = self.clip(self._early_channels(pixels, masked_pixels)).image_embeds[:, None]
    else:
      embeddings = self.clip(torch.cat([pixels, masked_pixels])).image_embeds
      masked = embeddings[batch:].repeat_interleave(repeats, 0)
      tokens = torch.stack([embeddings[:batch], masked], 1)
      tokens = tokens.reshape(batch, self.config["num_tokens"], -1)
    has_gelu = self.config["activation"] == "gelu"
    activate = (lambda x: F.gelu(x, approximate="tanh")) if has_gelu else nn.Identity()
    x = activate(self.hidden(self.encoder_layer(tokens).flatten(1)))
    z = activate(self.features(x)).float()
    with torch.autocast(pixels.device.type, enabled=False):
      return (self.last(z)[:, 0] - self.config["shift"]) / self.config["scale"], z

  def _early_channels(self, pixels: Tensor, masked_pixels: Tensor) -> Tensor:
    """Computes the 13 input channels of a reward model with early fusion."""
    hole = (masked_pixels <= self.black).all(1, keepdim=True).to(pixels.dtype)
    channels = [pixels * hole, masked_pixels * (1 - hole), hole]
    for axis, pads in ((3, (0, 1)), (2, (0, 0, 0, 1))):
      step = lambda x, axis=axis, pads=pads: F.pad(x.diff(dim=axis).abs(), pads)
      size = step(pixels).mean(1, keepdim=True)
      channels += [size * hole, size * (1 - hole), size * step(hole)]
    return torch.cat(channels, 1)


class Theirs:
  """Computes the stages.

  `work(stage)` waits for the outputs of the stage; `read` copies them to the host.
  """

  def __init__(self, world: World, opponent: str):
    config = world.config
    self.world, self.config = world, config
    self.is_reference = opponent == "reference"
    self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    self.checks = True  # use the recorded noise and timesteps; False: draw new ones

    policy = Path(config.policy)
    load = {"torch_dtype": torch.float32}
    self.unet = diffusers.UNet2DConditionModel.from_pretrained(policy, subfolder="unet", **load)
    self.vae = diffusers.AutoencoderKL.from_pretrained(policy, subfolder="vae", **load)
    self.reward_network = RewardNetwork.from_pretrained(Path(config.reward))
    networks = [self.unet, self.vae, self.reward_network]
    for network in networks:
      network.eval().to(self.device)  # turns dropout off
    for network in networks[1:]:
      network.requires_grad_(False)
    if not self.is_reference:
      torch.set_float32_matmul_precision("high")
      torch.backends.cudnn.benchmark = True
      for network in networks:
        network.to(memory_format=torch.channels_last)
    self.behaviour = copy.deepcopy(self.unet).requires_grad_(False) if self.is_reference else None
    self.average = None
    if config.ema_decay:
      self.average = [parameter.detach().clone() for parameter in self.unet.parameters()]
    self.optimizer = torch.optim.AdamW(
      self.unet.parameters(),
      lr=config.learning_rate,
      betas=(config.adam_b1, config.adam_b2),
      eps=config.adam_eps,
      weight_decay=config.weight_decay,
      fused=not self.is_reference,
    )
    self.updates = 0
    if opponent == "compiled":
      for network in (self.unet, self.vae.encoder, self.vae.decoder, self.reward_network):
        network.compile(dynamic=False)

    scheduler = diffusers.DDIMScheduler.from_pretrained(policy, subfolder="scheduler")
    scheduler.set_timesteps(config.num_steps)
    alphas = scheduler.alphas_cumprod.double()
    self.steps = []  # timestep, ᾱ_t, ᾱ_t', σ
    for t in scheduler.timesteps.tolist():
      before = t - scheduler.config.num_train_timesteps // config.num_steps
      alpha = alphas[t]
      alpha_prev = alphas[before] if before >= 0 else scheduler.final_alpha_cumprod.double()
      variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
      sigma = config.eta * variance.sqrt()
      self.steps.append((torch.tensor(t).to(self.device), *map(float, (alpha, alpha_prev, sigma))))
    self.context, self.chol = self._tensor(world.context), self._tensor(world.chol)
    arrays = world.latents, world.cotangent, world.samples
    self.latents, self.cotangent, self.samples = map(self._channels_first, arrays)
    self.timestep = torch.tensor(worlds.TIMESTEP).to(self.device)

  def work(self, stage: str) -> Outputs:
    outputs = getattr(self, stage)()
    if self.device.type == "cuda":
      torch.cuda.synchronize()
    return outputs

  @staticmethod
  def read(outputs: Outputs) -> dict[str, np.ndarray]:
    def as_array(value) -> np.ndarray:
      if isinstance(value, dict):
        return worlds.join_small({name: x.float().cpu().numpy() for name, x in value.items()})
      return (value.permute(0, 2, 3, 1) if value.ndim == 4 else value).float().cpu().numpy()

    return {name: as_array(value) for name, value in outputs.items()}

  def prepare(self, stage: str) -> None:
    """Computes the inputs that the stage takes from earlier stages."""
    with torch.no_grad():
      if stage in ("unet_forward", "unet_gradient", "score", "update"):
        self.prompts = self._encode(*self._images())
      if stage == "update":
        self.trajectory = self._chain(self.prompts)
        samples = self._decode(self.trajectory.latents[-1], self.prompts)
        self.scores = self._score(self.prompts, samples)

  def _tensor(self, array: np.ndarray) -> Tensor:
    return torch.tensor(array, device=self.device)

  def _channels_first(self, array: np.ndarray) -> Tensor:
    """Transposes [B, H, W, C] to [B, C, H, W]."""
    return self._tensor(array).permute(0, 3, 1, 2).contiguous()

  def _autocast(self) -> contextlib.AbstractContextManager:
    if self.config.dtype == "bfloat16":
      return torch.autocast(self.device.type, torch.bfloat16)
    return contextlib.nullcontext()

  def _images(self) -> tuple[Tensor, Tensor]:
    return tuple(map(self._channels_first, (self.world.images, self.world.masks)))

  def _noise(self, number: int, like: Tensor) -> Tensor:
    """Returns the initial noise (number 0) or the noise of a step (from 1)."""
    if not self.checks:
      return torch.randn_like(like)
    return self._channels_first(self.world.noise[number])

  def _encode(self, images: Tensor, masks: Tensor) -> Prompts:
    known = 1 - masks
    with self._autocast():
      mean = self.vae.encode((2 * images - 1) * known).latent_dist.mean.float()
    factor = images.shape[-1] // mean.shape[-1]
    latents = mean * self.vae.config.scaling_factor
    corner = self.config.mask_latents == "corner"
    hole = masks[..., ::factor, ::factor] if corner else F.max_pool2d(masks, factor)
    conditions = torch.cat([hole, latents], 1)
    samples = self.config.samples_per_prompt
    return Prompts(*(x.repeat_interleave(samples, 0) for x in (masks, images * known, conditions)))

  def _predict(self, unet: nn.Module, prompts: Prompts, latents: Tensor, timestep: Tensor):
    sample = torch.cat([latents, prompts.conditions], 1)
    if not self.is_reference:
      sample = sample.contiguous(memory_format=torch.channels_last)
    context = self.context.expand(len(sample), -1, -1)
    with self._autocast():
      return unet(sample, timestep, context, return_dict=False)[0].float()

  def _guided(self, unet: nn.Module, prompts: Prompts, latents: Tensor, timestep: Tensor):
    """Predicts the noise; the reference predicts it twice and guides between the two."""
    if not self.is_reference:
      return self._predict(unet, prompts, latents, timestep)
    twice = Prompts(*(torch.cat([x, x]) for x in prompts))
    output = self._predict(unet, twice, torch.cat([latents, latents]), timestep)
    without_text, with_text = output.chunk(2)
    return without_text + 7.5 * (with_text - without_text)

  def _mean(self, latents: Tensor, noise: Tensor, alpha: float, alpha_prev: float, sigma: float):
    original = (latents - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)
    direction = math.sqrt(max(1 - alpha_prev - sigma**2, 0.0))
    return math.sqrt(alpha_prev) * original + direction * noise

  def _log_prob(self, prompts: Prompts, x_prev: Tensor, mean: Tensor, sigma: float) -> Tensor:
    density = -((x_prev - mean) ** 2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
    if self.config.log_prob_region == "all":
      return density.mean((1, 2, 3))
    hole = prompts.conditions[:, :1].expand_as(density)
    return (density * hole).sum((1, 2, 3)) / hole.sum((1, 2, 3))

  def _chain(self, prompts: Prompts) -> Trajectory:
    unet = self.behaviour if self.is_reference else self.unet
    latents = self._noise(0, prompts.conditions[:, :4])
    trajectory = Trajectory([latents], [])
    for number, (timestep, *step) in enumerate(self.steps, 1):
      predicted = self._guided(unet, prompts, latents, timestep)
      mean = self._mean(latents, predicted, *step)
      latents = mean + step[-1] * self._noise(number, mean)
      trajectory.latents.append(latents)
      trajectory.log_probs.append(self._log_prob(prompts, latents, mean, step[-1]))
    return trajectory

  def _decode_all(self, latents: Tensor) -> Tensor:
    with self._autocast():
      decoded = self.vae.decode(latents / self.vae.config.scaling_factor).sample.float()
    return (0.5 * decoded + 0.5).clamp(0, 1)

  def _decode(self, latents: Tensor, prompts: Prompts) -> Tensor:
    return torch.where(prompts.mask > 0, self._decode_all(latents), prompts.masked_image)

  def _pixels(self, images: Tensor) -> Tensor:
    """Preprocesses images for CLIP: resizes the shorter side, crops the centre, normalises."""
    size = self.reward_network.config["vision"]["image_size"]
    *_, height, width = images.shape
    resized = tuple(size * side // min(height, width) for side in (height, width))
    top, left = ((side - size) // 2 for side in resized)
    if self.is_reference:
      prepared = []
      for image in images:
        array = (255 * image).round().byte().permute(1, 2, 0).cpu().numpy()
        image = Image.fromarray(array).resize(resized[::-1], Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + size, top + size))
        prepared.append(torch.tensor(np.array(image)).permute(2, 0, 1) / 255)
      images = torch.stack(prepared).to(self.device)
    elif resized != (height, width):
      images = F.interpolate(images, resized, mode="bicubic", antialias=True)
      images = images[..., top : top + size, left : left + size].clamp(0, 1)
    mean, std = (self._tensor(np.float32(x))[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std

  def _score(self, prompts: Prompts, samples: Tensor) -> Scores:
    config, S = self.config, self.config.samples_per_prompt
    stride = 1 if self.is_reference else S
    with self._autocast():
      arguments = self._pixels(samples), self._pixels(prompts.masked_image[::stride])
      reward, z = self.reward_network(*arguments)
    norm = torch.linalg.solve_triangular(self.chol, z.float().T, upper=False).norm(dim=0)
    trust = torch.exp(config.trust.b - config.trust.k * norm)
    grouped = reward.reshape(-1, S) if S > 1 else reward[None]
    centred = grouped - grouped.mean(1, keepdim=True)
    deviation = (centred.square().sum() / (centred.numel() - 1)).sqrt()
    limit = config.advantage_clip
    return Scores(reward, trust, (centred / (deviation + 1e-7)).clamp(-limit, limit).flatten())

  def _update(self, prompts: Prompts, trajectory: Trajectory, scores: Scores) -> list[Tensor]:
    """Does all updates of an iteration; returns their metrics, which stay on the device."""
    config = self.config
    if self.checks:
      drawn = self.world.indices
    else:
      first, last = config.skip_steps
      drawn = first + torch.randperm(config.num_steps - first - last)[: config.train_timesteps]
      drawn = drawn.reshape(config.updates_per_iteration, -1).numpy()
    metrics = []
    for indices in drawn:
      self.optimizer.zero_grad(set_to_none=True)
      for index in indices:
        timestep, *step = self.steps[index]
        latents, x_prev = trajectory.latents[index : index + 2]
        mean = self._mean(latents, self._guided(self.unet, prompts, latents, timestep), *step)
        log_ratio = self._log_prob(prompts, x_prev, mean, step[-1]) - trajectory.log_probs[index]
        ratio = log_ratio.exp()
        inside = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
        advantages = scores.advantages
        loss = scores.trust * torch.maximum(-advantages * ratio, -advantages * inside)
        (loss.sum() / (len(loss) * len(indices))).backward()
        with torch.no_grad():
          approx_kl = (torch.expm1(log_ratio) - log_ratio).mean()
          metrics += [ratio.mean(), (ratio != inside).float().mean(), approx_kl]
      gradients = [parameter.grad for parameter in self.unet.parameters()]
      metrics.append(nn.utils.get_total_norm(gradients))
      self.updates += 1
      if config.warmup_updates:
        share = min(1.0, self.updates / config.warmup_updates)
        self.optimizer.param_groups[0]["lr"] = config.learning_rate * share
      self.optimizer.step()
      if self.average is not None:
        with torch.no_grad():
          new, weight = list(self.unet.parameters()), 1 - config.ema_decay
          torch._foreach_lerp_(self.average, new, weight)
    if self.is_reference:
      self.behaviour.load_state_dict(self.unet.state_dict())
    return metrics

  def _params(self) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in self.unet.named_parameters()}

  @torch.no_grad()
  def unet_forward(self) -> Outputs:
    return {"output": self._predict(self.unet, self.prompts, self.latents, self.timestep)}

  def unet_gradient(self) -> Outputs:
    self.optimizer.zero_grad(set_to_none=True)
    output = self._predict(self.unet, self.prompts, self.latents, self.timestep)
    (output * self.cotangent).sum().backward()
    return {"gradient": {name: x.grad for name, x in self.unet.named_parameters()}}

  @torch.no_grad()
  def encode(self) -> Outputs:
    return {"latents": self._encode(*self._images()).conditions[:, 1:]}

  @torch.no_grad()
  def decode(self) -> Outputs:
    return {"images": self._decode_all(self.latents)}

  @torch.no_grad()
  def rollout(self) -> Outputs:
    prompts = self._encode(*self._images())
    trajectory = self._chain(prompts)
    samples = self._decode(trajectory.latents[-1], prompts)
    return {"images": samples, "log_probs": torch.stack(trajectory.log_probs)}

  @torch.no_grad()
  def score(self) -> Outputs:
    return self._score(self.prompts, self.samples)._asdict()

  def update(self) -> Outputs:
    self._update(self.prompts, self.trajectory, self.scores)
    return {"params": self._params()}

  def iteration(self) -> Outputs:
    with torch.no_grad():
      prompts = self._encode(*self._images())
      trajectory = self._chain(prompts)
      samples = self._decode(trajectory.latents[-1], prompts)
      scores = self._score(prompts, samples)
    self._update(prompts, trajectory, scores)
    return {"images": samples, "reward": scores.reward, "params": self._params()}
