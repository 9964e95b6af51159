"""Every tensor at the edge of an exported network, declared once.

The dynamic axes of a trace, the shapes of its example inputs, the names in the ONNX graph and the manifest's tensor
lists all derive from the `Signature`s made here.  Names and dynamic axes are those of optimum's exporter, so that its
ORTStableDiffusionPipeline opens the same files; a symbol such as "latent_height * 8" is an expression that it
evaluates.  All floating-point tensors are float32, whatever the precision inside.

    text_encoder   input_ids (batch, 77) int64                          → last_hidden_state (batch, 77, D)
                                                                          pooler_output (batch, D)
    unet           sample (batch, 4, h, w), timestep (1,),              → out_sample (batch, 4, h, w)
                   encoder_hidden_states (batch, sequence_length, D)
                   of a latent consistency model also
                   timestep_cond (batch, G)
    vae_decoder    latent_sample (batch, 4, h, w)                       → sample (batch, 3, 8 h, 8 w) in about [-1, 1]
    vae_encoder    sample (batch, 3, H, W) in [-1, 1]                   → latent_parameters (batch, 8, H/8, W/8)
    taesd          latent_sample (batch, 4, h, w), scaled               → sample (batch, 3, 8 h, 8 w) in about [-1, 1]
    safety_checker clip_input (batch, 3, 224, 224)                      → special_scores (batch, 3)
                                                                          concept_scores (batch, 17)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sd_runtime.tensor import Dim, TensorSpec

MIN_CELLS, MAX_CELLS = 8, 128  # latent height and width: 64 to 1024 pixels where a cell is 8 pixels
MAX_IMAGES = 16
MAX_PROMPTS = 128  # prompts in one call of the text encoder, counting every 77-token chunk
MAX_CHUNKS = 16  # 77-token chunks of one prompt
SPECIAL_CONCEPTS, CONCEPTS = 3, 17  # that diffusers' StableDiffusionSafetyChecker has, fixed in its code

# Sizes at which graphs are traced.  They are odd and differ from each other so that nothing else in the graph equals
# them by chance: traced at an even latent size, a graph takes only multiples of 64 pixels.
TRACE_BATCH, TRACE_HEIGHT, TRACE_WIDTH, TRACE_CHUNKS = 2, 17, 25, 2


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of one network, in the order of its arguments and results."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a checkpoint that its signatures depend on.

    channels   of the latents             positions  tokens in a prompt's chunk (77)
    pixels     along a latent cell        width      of a token's hidden state (D)
    cells      latent height and width that the UNet was trained at
    guidance   width of the embedding (G) that tells the UNet the guidance scale; None: it is not told
    """

    channels: int
    pixels: int
    cells: int
    positions: int
    width: int
    guidance: int | None = None

    @classmethod
    def of(cls, configs: Mapping[str, Mapping[str, Any]]) -> Sizes:
        """From the configs of text_encoder, unet and vae, with diffusers' defaults for fields left out."""
        text, unet, vae = configs["text_encoder"], configs["unet"], configs["vae"]
        cells = unet.get("sample_size") or 64
        return cls(
            channels=vae.get("latent_channels", 4),
            pixels=2 ** (len(vae.get("block_out_channels", (64,))) - 1),
            cells=max(cells) if isinstance(cells, (list, tuple)) else cells,
            positions=text.get("max_position_embeddings", 77),
            width=text.get("hidden_size", 512),
            guidance=unet.get("time_cond_proj_dim"),
        )

    def latent_axes(self) -> tuple[Dim, Dim]:
        """Latent height and width."""
        tuned = min(max(self.cells, MIN_CELLS), MAX_CELLS)
        return Dim("latent_height", MIN_CELLS, tuned, MAX_CELLS), Dim("latent_width", MIN_CELLS, tuned, MAX_CELLS)


def _scaled(axis: Dim, factor: int, symbol: str) -> Dim:
    """`axis` in units that are `factor` times smaller."""
    return Dim(symbol, axis.min * factor, axis.opt * factor, axis.max * factor)


def text_encoder_signature(sizes: Sizes) -> Signature:
    """CLIP's text encoder."""
    batch = Dim("batch", 1, 2, MAX_PROMPTS)
    return Signature(
        inputs=(TensorSpec("input_ids", "int64", (batch, sizes.positions)),),
        outputs=(
            TensorSpec("last_hidden_state", "float32", (batch, sizes.positions, sizes.width)),
            TensorSpec("pooler_output", "float32", (batch, sizes.width)),
        ),
    )


def text_embeds_signature(sizes: Sizes) -> Signature:
    """The same encoder from token embeddings on (before positions are added), for textual inversion and mixing."""
    hidden = (Dim("batch", 1, 2, MAX_PROMPTS), sizes.positions, sizes.width)
    return Signature(
        inputs=(TensorSpec("inputs_embeds", "float32", hidden),),
        outputs=(TensorSpec("last_hidden_state", "float32", hidden),),
    )


def unet_signature(sizes: Sizes) -> Signature:
    """The denoiser; a guided image takes two rows of the batch.  `timestep` is one number for the whole batch; like
    the samplers' it may have a fraction."""
    batch = Dim("batch", 1, 2, 2 * MAX_IMAGES)
    latents = (batch, sizes.channels, *sizes.latent_axes())
    sequence = Dim("sequence_length", sizes.positions, sizes.positions, MAX_CHUNKS * sizes.positions)
    told = () if sizes.guidance is None else (TensorSpec("timestep_cond", "float32", (batch, sizes.guidance)),)
    return Signature(
        inputs=(
            TensorSpec("sample", "float32", latents),
            TensorSpec("timestep", "float32", (1,)),
            TensorSpec("encoder_hidden_states", "float32", (batch, sequence, sizes.width)),
            *told,
        ),
        outputs=(TensorSpec("out_sample", "float32", latents),),
    )


def vae_decoder_signature(sizes: Sizes) -> Signature:
    """Latents already divided by the scaling factor → RGB."""
    batch = Dim("batch", 1, 1, MAX_IMAGES)
    cells = sizes.latent_axes()
    rgb = [_scaled(axis, sizes.pixels, f"{axis.symbol} * {sizes.pixels}") for axis in cells]
    return Signature(
        inputs=(TensorSpec("latent_sample", "float32", (batch, sizes.channels, *cells)),),
        outputs=(TensorSpec("sample", "float32", (batch, 3, *rgb)),),
    )


def vae_encoder_signature(sizes: Sizes) -> Signature:
    """RGB, its sides multiples of a cell → mean and log variance of the latents, stacked; not yet scaled."""
    batch = Dim("batch", 1, 1, MAX_IMAGES)
    axes = list(zip(("height", "width"), sizes.latent_axes(), strict=True))
    rgb = [_scaled(axis, sizes.pixels, symbol) for symbol, axis in axes]
    cells = [Dim(f"{symbol} / {sizes.pixels}", axis.min, axis.opt, axis.max) for symbol, axis in axes]
    return Signature(
        inputs=(TensorSpec("sample", "float32", (batch, 3, *rgb)),),
        outputs=(TensorSpec("latent_parameters", "float32", (batch, 2 * sizes.channels, *cells)),),
    )


def safety_checker_signature(config: Mapping[str, Any]) -> Signature:
    """From the config of a safety checker: pictures as CLIP's image processor makes them → scores a concept."""
    batch = Dim("batch", 1, 1, MAX_IMAGES)
    side = (config.get("vision_config") or {}).get("image_size", 224)
    return Signature(
        inputs=(TensorSpec("clip_input", "float32", (batch, 3, side, side)),),
        outputs=(
            TensorSpec("special_scores", "float32", (batch, SPECIAL_CONCEPTS)),
            TensorSpec("concept_scores", "float32", (batch, CONCEPTS)),
        ),
    )


def trace_shape(spec: TensorSpec, pixels: int) -> tuple[int, ...]:
    """The shape of `spec`'s example at which a graph is traced; `pixels` a latent cell."""
    sizes = {
        "batch": TRACE_BATCH,
        "latent_height": TRACE_HEIGHT,
        "latent_width": TRACE_WIDTH,
        "height": TRACE_HEIGHT * pixels,
        "width": TRACE_WIDTH * pixels,
    }
    return tuple(
        axis if isinstance(axis, int) else sizes.get(axis.symbol, axis.min * TRACE_CHUNKS) for axis in spec.shape
    )
