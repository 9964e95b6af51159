"""The tensors at the edge of an exported graph, declared once.

The dynamic axes of a trace, the shapes of its example inputs, the names in the ONNX graph and the manifest's tensor
lists all derive from a graph's `Signature`.  A network's stands in its file under `networks/`.  Names and dynamic axes
are those of optimum's exporter, so that its ORTStableDiffusionPipeline opens the same files; a symbol such as
"latent_height * 8" is an expression that optimum evaluates.  All floating-point tensors are float32, whatever the
precision inside.
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

# Sizes at which graphs are traced.  They are odd and differ from each other so that nothing else in the graph equals
# them by chance: traced at an even latent size, a graph takes only multiples of 64 pixels.
TRACE_BATCH, TRACE_HEIGHT, TRACE_WIDTH, TRACE_CHUNKS = 2, 17, 25, 2

TIMESTEPS = "timesteps"  # axis of one number for each row of the batch, or of one number for all
SPREAD = (TIMESTEPS,)  # axes that the graph spreads over the batch by itself: they are traced at 1, and vary


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of one graph, in the order of its arguments and results."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a checkpoint that its signatures depend on.

    channels   of the latents             positions  tokens in a prompt's chunk (77)
    pixels     along a latent cell        width      of a token's hidden state (D)
    cells      latent height and width that the UNet was trained at
    guidance   width of the embedding (G) of the guidance scale, an input of the UNet; None: no such input
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

    def rgb_axes(self, symbols: tuple[str, str]) -> tuple[Dim, Dim]:
        """Height and width in pixels, under these symbols."""
        height, width = (
            Dim(symbol, axis.min * self.pixels, axis.opt * self.pixels, axis.max * self.pixels)
            for symbol, axis in zip(symbols, self.latent_axes(), strict=True)
        )
        return height, width


def trace_shape(spec: TensorSpec, pixels: int) -> tuple[int, ...]:
    """The shape of `spec`'s example at which a graph is traced; `pixels` a latent cell."""
    sizes = {
        "batch": TRACE_BATCH,
        "latent_height": TRACE_HEIGHT,
        "latent_width": TRACE_WIDTH,
        TIMESTEPS: 1,
        "height": TRACE_HEIGHT * pixels,
        "width": TRACE_WIDTH * pixels,
    }
    return tuple(
        axis if isinstance(axis, int) else sizes.get(axis.symbol, axis.min * TRACE_CHUNKS) for axis in spec.shape
    )
