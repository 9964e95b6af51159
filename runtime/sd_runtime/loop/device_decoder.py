"""The VAE decoder on the device, and the conversion of its samples to the bytes of a picture next to it."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack

import numpy as np

from ..engines.device import DeviceEngine, Launch, Pending
from ..engines.pool import Pool
from ..networks.vae import Decoded
from ..tensor import Array

IDLE_CALLS = 2  # sizes of pictures whose memory and recordings are kept for the next request


class DeviceDecoder:
    """Latents → pictures on one device, one picture at a time: the largest of all activations are here."""

    def __init__(self, decoder: DeviceEngine, pixels: DeviceEngine, cell: int) -> None:
        """`pixels`: the engine that converts; `cell`: pixels along the side of a latent cell."""

        def build(shape: tuple[int, ...]) -> DecoderCall:
            return DecoderCall(decoder, pixels, shape, cell)

        self._calls = Pool(build, IDLE_CALLS)

    def __call__(self, latents: Array, scaling_factor: float) -> Decoded:
        """(B, C, h, w) float32 latents → their pictures.  NumericalError: the decoder overflowed."""
        with self._calls.borrowed(latents.shape[1:]) as call:
            return call.run(latents / np.float32(scaling_factor))

    def close(self) -> None:
        self._calls.close()


class DecoderCall:
    """The tensors and the recording for one size.  One request at a time."""

    def __init__(self, decoder: DeviceEngine, pixels: DeviceEngine, latent: tuple[int, ...], cell: int) -> None:
        channels, height, width = latent[0], latent[1] * cell, latent[2] * cell
        with ExitStack() as stack:

            def closing(launch: Launch) -> Launch:
                stack.callback(launch.close)
                return launch

            self._latent = decoder.tensor("latent_sample", (1, channels, *latent[1:]))
            stack.callback(self._latent.close)
            self._sample = decoder.tensor("sample", (1, 3, height, width))
            stack.callback(self._sample.close)
            self._pixels = pixels.tensor("pixels", (1, height, width, 3))
            stack.callback(self._pixels.close)
            decode = closing(decoder.prepare({"latent_sample": self._latent, "sample": self._sample}))
            convert = closing(pixels.prepare({"sample": self._sample, "pixels": self._pixels}))
            self._launch = closing(decoder.device.record([decode, convert]))
            self._resources = stack.pop_all()

    def run(self, latents: Array) -> Decoded:
        """(B, C, h, w) float32, as the decoder takes them.  A picture is fetched while the next is being made."""
        samples = np.empty((len(latents), *self._sample.shape[1:]), np.float32)
        pixels = np.empty((len(latents), *self._pixels.shape[1:]), np.uint8)
        under_way: deque[tuple[Pending, Pending]] = deque()
        for index, one in enumerate(latents):
            self._latent.write(one[None])
            self._launch()
            under_way.append((self._sample.read(), self._pixels.read()))
            if index:
                fetch(under_way.popleft(), samples[index - 1], pixels[index - 1])
        fetch(under_way.popleft(), samples[-1], pixels[-1])
        return Decoded(samples, pixels)

    def close(self) -> None:
        self._resources.close()


def fetch(copies: tuple[Pending, Pending], sample: Array, pixels: Array) -> None:
    """Wait for the copies of one picture and take them over."""
    for pending, target in zip(copies, (sample, pixels), strict=True):
        np.copyto(target, pending.wait()[0])
