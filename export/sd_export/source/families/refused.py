"""What is refused, and what to call it: tables of marks by which other kinds of model are recognised."""

from __future__ import annotations

# Starts of the pipeline's class in model_index.json, the longer before the shorter.
PIPELINES = {
    "StableDiffusionXL": "Stable Diffusion XL",
    "StableDiffusion3": "Stable Diffusion 3",
    "StableDiffusionControlNet": "a ControlNet",
    "StableDiffusionUpscale": "an upscaler",
    "StableDiffusionLatentUpscale": "an upscaler",
    "StableDiffusionDepth2Img": "a depth-to-image model",
    "StableDiffusionInstructPix2Pix": "InstructPix2Pix",
    "StableUnCLIP": "an unCLIP model",
    "Flux": "Flux",
}

# Input channels of the UNet.
INPUT_CHANNELS = {9: "an inpainting model", 8: "InstructPix2Pix", 7: "an upscaler", 5: "a depth-to-image model"}

# Fields of a UNet's config that add inputs which the classic pipeline does not feed.
EXTRA_INPUTS = {
    "addition_embed_type": "Stable Diffusion XL or a relative (its UNet takes more than text and time)",
    "class_embed_type": "an unCLIP model (its UNet takes class embeddings)",
    "num_class_embeds": "an upscaler (its UNet takes a noise level)",
    "encoder_hid_dim": "a model whose UNet projects its text embeddings",
    "encoder_hid_dim_type": "a model whose UNet projects its text embeddings",
}

# Keys in a single file (regular expressions), most telling first.
KEYS = (
    (r"double_blocks\.", "Flux"),
    (r"joint_blocks\.", "Stable Diffusion 3"),
    (r"^conditioner\.embedders\.", "Stable Diffusion XL"),
    (r"^control_model\.|input_hint_block\.|^controlnet_", "a ControlNet"),
    (r"lora_", "a LoRA, an addition to a checkpoint"),
    (
        r"^(mid_block|encoder\.mid_block|decoder\.mid_block)\.",
        "one network in diffusers' naming, not a whole checkpoint",
    ),
    (r"^(text_model\.)?encoder\.layers\.", "a text encoder on its own"),
)
