"""Random checkpoints of the architectures that are supported, as small as these can be, saved by diffusers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from sd_export.source.resolve import DEMO_FOLDER
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

try:
    from transformers import CLIPImageProcessorPil as ImageProcessor
except ImportError:  # before transformers 5, where it works with Pillow under its plain name
    from transformers import CLIPImageProcessor as ImageProcessor

END_OF_TEXT = 601  # in the demo's vocabulary
WIDTH = 24  # of a token's hidden state
SIDE = 30  # pixels of a picture as the tiny safety checker sees it
BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SEEDS = range(6)
CHECKED: dict[str, Any] = {
    "prompt": "a large yellow star",
    "num_images_per_prompt": len(SEEDS),
    "num_inference_steps": 2,
    "height": 64,
    "width": 72,
}
STABLE_DIFFUSION_2: dict[str, Any] = {
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "upcast_attention": True,
}


def jitter(module: torch.nn.Module, seed: int) -> Any:
    """Make the norms and biases of an untrained network differ: the exporter stores equal tensors once."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    """Two levels, attention on the first, as in Stable Diffusion 1."""
    settings = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return jitter(UNet2DConditionModel(**(settings | changes)), 0)


def tiny_vae(seed: int = 1, **changes: Any) -> AutoencoderKL:
    """Four levels, eight pixels a cell."""
    levels = 4
    settings = {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": 4,
        "sample_size": 64,
    }
    return jitter(AutoencoderKL(**(settings | changes)), seed)


def tiny_taesd() -> AutoencoderTiny:
    widths = (8, 8, 8, 8)
    return jitter(AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths), 2)


def tiny_text_encoder(**changes: Any) -> CLIPTextModel:
    settings = {
        "vocab_size": END_OF_TEXT + 1,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": WIDTH,
        "bos_token_id": END_OF_TEXT - 1,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": END_OF_TEXT,
    }
    return jitter(CLIPTextModel(CLIPTextConfig(**(settings | changes))), 3)


def tiny_tokenizer(**changes: Any) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(DEMO_FOLDER / "tokenizer", **changes)


def safety_checker(seed: int = 4, **vision: Any) -> StableDiffusionSafetyChecker:
    """Random, with concepts that differ; `vision` changes the tiny sizes."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes |= {"image_size": SIDE, "patch_size": SIDE // 5, "projection_dim": 16} | vision
    text = {"hidden_size": WIDTH, "vocab_size": 3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config=sizes, projection_dim=sizes["projection_dim"])
    checker = jitter(StableDiffusionSafetyChecker(config), seed)
    generator = torch.Generator().manual_seed(seed)
    for concepts in (checker.concept_embeds, checker.special_care_embeds):
        concepts.data.normal_(generator=generator)
    return checker


def set_thresholds(checker: StableDiffusionSafetyChecker, clip_input: torch.Tensor) -> None:
    """So that of these pictures half call for care, which raises other scores by 0.01, and half are withheld."""
    with torch.no_grad():
        embeddings = checker.visual_projection(checker.vision_model(clip_input)[1])
        for name, margin in (("special_care_embeds", 0.0), ("concept_embeds", 0.01)):
            cosines = cosine_distance(embeddings, getattr(checker, name))  # (B, 3) or (B, 17)
            usual = cosines.mean(dim=0)
            highest = (cosines - usual).max(dim=1).values.sort().values  # (B,)
            middle = highest[len(highest) // 2 - 1 : len(highest) // 2 + 1].mean()
            getattr(checker, f"{name}_weights").copy_(usual + middle + margin)


def image_processor(side: int = SIDE) -> Any:
    return ImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def stable_diffusion_1(folder: Path) -> None:
    """As CompVis' 1.4 lies on the hub: in float16, with a safety checker, which withholds some of `CHECKED`."""
    torch.manual_seed(14)
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        unet=tiny_unet(),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    checker, processor = safety_checker(), image_processor()
    pictures = pipeline(generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], **CHECKED).images
    set_thresholds(checker, processor(pictures, return_tensors="pt").pixel_values)
    pipeline.register_modules(safety_checker=checker, feature_extractor=processor)
    half(pipeline).save_pretrained(folder, variant="fp16")


def half(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    for network in pipeline.components.values():
        if isinstance(network, torch.nn.Module):
            network.half()
    return pipeline


def stable_diffusion_2(folder: Path, scheduler: Any = None) -> None:
    """2.1: predicts v, heads by level, linear projections, a text encoder without its last layer, "!" as padding."""
    torch.manual_seed(21)
    StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(hidden_act="gelu", num_hidden_layers=2),
        tokenizer=tiny_tokenizer(pad_token="!"),
        unet=tiny_unet(**STABLE_DIFFUSION_2),
        scheduler=scheduler
        or DDIMScheduler(prediction_type="v_prediction", steps_offset=1, clip_sample=False, **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def sd_turbo(folder: Path) -> None:
    """Stable Diffusion 2.1 distilled: the same networks, Euler steps from the end of the schedule."""
    stable_diffusion_2(folder, EulerDiscreteScheduler(timestep_spacing="trailing", steps_offset=1, **BETAS))


def latent_consistency_model(folder: Path) -> None:
    torch.manual_seed(8)
    LatentConsistencyModelPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        unet=tiny_unet(time_cond_proj_dim=16),
        scheduler=LCMScheduler(steps_offset=1, **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def load_reference(folder: Path, **options: Any) -> Any:
    """diffusers' own pipeline for a checkpoint, in float32."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
