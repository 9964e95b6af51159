"""Which checkpoints are supported.  Everything else is refused in one line that says what it is."""

from __future__ import annotations

from collections.abc import Mapping

from sd_runtime.errors import ExportError, one_line

from .checkpoint import Config

SUPPORTED = "Stable Diffusion 1.x and 2.x, text to image, and latent consistency models made of these"

# The inpainting class also serves ordinary 4-channel UNets; `check_networks` tells them apart.
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
FAMILIES = {
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
INPUT_CHANNELS = {9: "an inpainting model", 8: "InstructPix2Pix", 7: "an upscaler", 5: "a depth-to-image model"}
# Fields of a UNet's config that add inputs which the classic pipeline does not feed, and who sets them.
EXTRA_INPUTS = {
    "addition_embed_type": "Stable Diffusion XL or a relative (its UNet takes more than text and time)",
    "class_embed_type": "an unCLIP model (its UNet takes class embeddings)",
    "num_class_embeds": "an upscaler (its UNet takes a noise level)",
    "encoder_hid_dim": "a model whose UNet projects its text embeddings",
    "encoder_hid_dim_type": "a model whose UNet projects its text embeddings",
}
SAFETY_CHECKER = "StableDiffusionSafetyChecker"
DISTILLED = {"sd-turbo": (1, 0.0)}  # by name, as no file tells it: (steps, guidance scale) of the model card


def unsupported(model: str, kind: str) -> ExportError:
    return ExportError(f"model '{one_line(model)}' is {kind}, which is not supported", accepted=SUPPORTED)


def check_pipeline(model: str, model_index: Config) -> None:
    """Refuse a folder whose model_index.json names a pipeline, or a part, that is not the classic one's."""
    pipeline = str(model_index.get("_class_name"))
    if pipeline not in PIPELINES:
        family = next((name for start, name in FAMILIES.items() if pipeline.startswith(start)), "another kind of model")
        raise unsupported(model, f"{family} ({one_line(pipeline)})")
    for part, accepted in CLASSES.items():
        entry = model_index.get(part)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found not in accepted:
            raise unsupported(model, f"a pipeline with {one_line(found)} as {part} where {accepted[0]} is needed")


def has_safety_checker(model: str, model_index: Config) -> bool:
    """Whether a pipeline names a safety checker, which must be the one that there is."""
    entry = model_index.get("safety_checker")
    found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    if found not in (None, SAFETY_CHECKER):
        raise unsupported(
            model, f"a pipeline with {one_line(found)} as safety_checker where {SAFETY_CHECKER} is needed"
        )
    return found is not None


def check_networks(model: str, configs: Mapping[str, Config]) -> str:
    """Refuse networks that the classic pipeline does not drive; returns the architecture as a phrase for people."""
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    for field, kind in EXTRA_INPUTS.items():
        if unet.get(field) is not None:
            raise unsupported(model, kind)
    channels = unet.get("in_channels", 4)
    if channels != 4:
        kind = INPUT_CHANNELS.get(channels, "another kind of model") if isinstance(channels, int) else "malformed"
        raise unsupported(model, f"{kind} (a {one_line(channels)}-channel UNet)")
    if unet.get("out_channels", 4) != 4 or vae.get("latent_channels", 4) != 4:
        raise unsupported(model, "a model whose latents do not have 4 channels")
    width, expected = text.get("hidden_size", 512), unet.get("cross_attention_dim", 1280)  # the libraries' defaults
    if width != expected:
        raise ExportError(
            f"model '{one_line(model)}': text_encoder and unet do not fit together",
            got=f"hidden_size {width}, cross_attention_dim {expected}",
        )
    family = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}.get(
        width if isinstance(width, int) else 0, f"Stable Diffusion of its own size (text width {one_line(width)})"
    )
    return family if unet.get("time_cond_proj_dim") is None else f"{family}, a latent consistency model"


def pipeline_class(configs: Mapping[str, Config]) -> str:
    """The diffusers pipeline, and optimum's by the same name, that draws with these networks."""
    told = configs["unet"].get("time_cond_proj_dim") is not None
    return "LatentConsistencyModelPipeline" if told else "StableDiffusionPipeline"


def usual_settings(name: str, configs: Mapping[str, Config]) -> tuple[int, float]:
    """Inference steps and guidance scale for a checkpoint that recommends none: its kind's, or diffusers' defaults."""
    if pipeline_class(configs) == "LatentConsistencyModelPipeline":
        return 4, 8.5
    return DISTILLED.get(name, (50, 7.5))
