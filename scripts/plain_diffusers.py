#!/usr/bin/env python3
"""What a user of diffusers writes to get one picture; scripts/benchmark.py runs it as the other side.

scripts/plain_diffusers.py CHECKPOINT PROMPT STEPS GUIDANCE_SCALE SEED OUTPUT
"""

import sys

import torch
from diffusers import StableDiffusionPipeline

checkpoint, prompt, steps, guidance_scale, seed, output = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(checkpoint, dtype=torch.float32)
generator = torch.Generator().manual_seed(int(seed))
result = pipe(prompt, num_inference_steps=int(steps), guidance_scale=float(guidance_scale), generator=generator)
result.images[0].save(output)
