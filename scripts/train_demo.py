#!/usr/bin/env python3
"""Trains the demo checkpoint from nothing, on the CPU: pictures, tokenizer, autoencoder, then UNet and text encoder.

    scripts/train_demo.py OUT            about 2.4 hours on two cores (autoencoder 17 min, latents 2, UNet 76 and 48)

Shapes are learnt within 2000 steps; which colour belongs to what is learnt much later and at high noise levels, which
are therefore drawn more often.  The place that a prompt names is decided higher still: a second course, with two heads
a block instead of eight (16, 32 and 48 wide, what fused attention kernels take; no parameter changes its shape), draws
pictures with a place twice as often and the highest noise levels most.  OUT becomes a checkpoint in diffusers layout,
half precision.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from demo_data import PICTURES, Scene, render, training_scenes
from demo_tokenizer import save_tokenizer, train_tokenizer
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE = 128  # pixels; a latent is SIZE / 8
# Stable Diffusion 1.5's own file, to the letter: what it leaves out matters when another sampler reads it.
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
DEFAULTS = {"num_inference_steps": 25, "guidance_scale": 2.5, "height": SIZE, "width": SIZE}
CROP = 64  # pixels; the autoencoder learns on crops, four times cheaper
MERGES = 200
UNCONDITIONAL = 0.1  # share of empty prompts, which guidance needs (Ho & Salimans 2022)
EMA_DECAY = 0.998


@dataclass(frozen=True)
class Course:
    """How UNet and text encoder are trained for a while.

    heads          attention heads of a block
    learning_rate  at its peak
    place          how often a picture whose caption names a place is drawn, beside one whose caption does not
    timesteps      (share of the pictures, the lowest timestep that they are noised at), from there up to the last
    seed           of what is drawn
    """

    heads: int
    learning_rate: float
    place: float
    timesteps: tuple[tuple[float, int], ...]
    seed: int


COLOURS = Course(heads=8, learning_rate=1e-3, place=1.0, timesteps=((0.5, 0), (0.5, 500)), seed=2)
PLACES = Course(heads=2, learning_rate=8e-4, place=2.0, timesteps=((0.35, 0), (0.35, 500), (0.3, 800)), seed=11)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    scenes = training_scenes(args.pictures)
    captions = [scene.caption for scene in scenes]
    save_tokenizer(args.out / "tokenizer", *train_tokenizer(captions, MERGES))
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")

    vae = new_autoencoder()
    train_autoencoder(vae, scenes, args.vae_steps)
    latents = encode(vae, scenes)
    vae.register_to_config(scaling_factor=round(1 / latents[:512].std().item(), 5))

    unet, text_encoder = new_unet(COLOURS.heads), new_text_encoder(tokenizer)
    scheduler = PNDMScheduler.from_config(SCHEDULER)
    token_ids, empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
    placed = np.array([scene.description.place != "" for scene in scenes])
    latents = latents * vae.config.scaling_factor
    for course, steps in ((COLOURS, args.unet_steps), (PLACES, args.place_steps)):
        unet = with_heads(unet, course.heads)
        noised = noised_batches(latents, token_ids, empty, placed, course, scheduler)
        train_denoiser(unet, text_encoder, noised, course, steps)
    save(args.out, vae, text_encoder, unet, scheduler)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the new checkpoint")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="size of the training set")
    parser.add_argument("--vae-steps", type=int, default=7000)
    parser.add_argument("--unet-steps", type=int, default=8000)
    parser.add_argument("--place-steps", type=int, default=7657, help="of the UNet's second course")
    parser.add_argument("--threads", type=int, default=2, help="of torch; on a busy machine one thread beats two")
    args = parser.parse_args(arguments)
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"OUT: {args.out} is not empty")
    return args


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="quick_gelu",
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_unet(heads: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=heads,  # which diffusers, for this class, takes for their number
        norm_num_groups=8,
    )


def with_heads(unet: UNet2DConditionModel, heads: int) -> UNet2DConditionModel:
    """The same weights in a UNet of `heads` heads a block: their number is no part of any weight's shape."""
    changed = new_unet(heads)
    changed.load_state_dict(unet.state_dict())
    return changed


def train_autoencoder(vae: AutoencoderKL, scenes: list[Scene], steps: int) -> None:
    """L1 + L2 + a little KL on random crops: plain pictures need no perceptual or adversarial loss."""
    rng = np.random.default_rng(1)

    def loss() -> Tensor:
        batch = [scenes[i] for i in rng.integers(len(scenes), size=16)]
        y, x = rng.integers(0, SIZE - CROP + 1, 2)
        pixels = to_tensor(batch)[:, :, y : y + CROP, x : x + CROP]
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        divergence = posterior.kl().mean() / (CROP / 8) ** 2
        total: Tensor = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels) + 1e-5 * divergence
        return total

    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=0)
    for _ in descend(loss, optimizer, steps, "autoencoder", warmup=100):
        pass


def encode(vae: AutoencoderKL, scenes: list[Scene]) -> Tensor:
    """The posterior means of all pictures, unscaled: (n, 4, 16, 16)."""
    means = []
    with torch.no_grad(), progress(len(scenes), "latents") as bar:
        for start in range(0, len(scenes), 64):
            means.append(vae.encode(to_tensor(scenes[start : start + 64])).latent_dist.mean)
            bar.update(len(means[-1]))
    return torch.cat(means)


def noised_batches(
    latents: Tensor,
    token_ids: Tensor,
    empty: Tensor,
    placed: NDArray[np.bool_],
    course: Course,
    scheduler: PNDMScheduler,
    size: int = 48,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Endless batches (noisy latents, timesteps, token ids, the noise); Ho et al. 2020, equation 4.

    placed: (n,), whether a picture's caption names a place."""
    rng = np.random.default_rng(course.seed)
    often = np.where(placed, course.place, 1.0)
    shares, lowest = zip(*course.timesteps, strict=True)
    end = scheduler.config.num_train_timesteps
    while True:
        chosen = torch.from_numpy(rng.choice(len(latents), size=size, p=often / often.sum()))
        clean = latents[chosen]
        ids = torch.where(torch.rand(size, 1) < UNCONDITIONAL, empty, token_ids[chosen])
        low = rng.choice(lowest, size=size, p=shares)
        timesteps = torch.from_numpy(rng.integers(low, end))
        noise = torch.randn_like(clean)
        yield scheduler.add_noise(clean, noise, timesteps), timesteps, ids, noise


def train_denoiser(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    batches: Iterator[tuple[Tensor, Tensor, Tensor, Tensor]],
    course: Course,
    steps: int,
) -> None:
    """Trains both together to predict the noise (Ho et al. 2020, equation 14); leaves them with averaged weights."""

    def loss() -> Tensor:
        sample, timesteps, ids, noise = next(batches)
        return F.mse_loss(unet(sample, timesteps, text_encoder(ids).last_hidden_state).sample, noise)

    parameters = [parameter.detach() for model in (unet, text_encoder) for parameter in model.parameters()]
    average = [parameter.clone() for parameter in parameters]
    learnt = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(learnt, course.learning_rate, weight_decay=0.01)
    for step in descend(loss, optimizer, steps, "unet", warmup=200):
        decay = min(EMA_DECAY, (step + 1) / (step + 20))  # short memory first: the start is worth forgetting
        torch._foreach_lerp_(average, parameters, 1 - decay)
    torch._foreach_copy_(parameters, average)


def descend(
    loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, steps: int, name: str, warmup: int
) -> Iterator[int]:
    """Minimises `loss`, which draws its own batch; yields the step's number after each step.

    The learning rate rises linearly over `warmup` steps and falls as a half cosine to 2 %."""
    (group,) = optimizer.param_groups
    peak = group["lr"]
    with progress(steps, name) as bar:
        for step in range(steps):
            group["lr"] = peak * min(1, (step + 1) / warmup) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
            bar.update()
            yield step


def save(
    out: Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    scheduler: PNDMScheduler,
) -> None:
    """diffusers layout in half precision; our recommended settings go into model_index.json."""
    for model in (vae, text_encoder, unet):
        model.half()
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")  # afresh: one that was used saves its padding too
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(out)
    weights = out / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})  # transformers 5 leaves out the prefix that 4 looks for
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    index = out / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_defaults": DEFAULTS}, indent=2) + "\n")


def to_tensor(scenes: list[Scene]) -> Tensor:
    """Pictures as (n, 3, SIZE, SIZE) in [-1, 1]."""
    pixels = np.stack([render(scene, SIZE) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(n, 77) token ids."""
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    return torch.as_tensor(ids)


def progress(total: int, name: str) -> tqdm[NoReturn]:
    """A bar on a terminal, a line a minute elsewhere."""
    return tqdm(total=total, desc=name, mininterval=0.5 if sys.stderr.isatty() else 60)


if __name__ == "__main__":
    sys.exit(main())
