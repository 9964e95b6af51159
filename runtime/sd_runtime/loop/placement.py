"""Where a pipeline's loops run: on the device where all that they take is there, else led by the host."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator, Iterable
from functools import cached_property, partial
from typing import TYPE_CHECKING

from ..bundle.bundle import Bundle
from ..engines.device import DeviceEngine
from ..engines.engines import Engines
from ..engines.protocol import Engine
from ..errors import DependencyError
from ..networks.vae import Decoded, check_finite, decode
from ..noise import NoiseSource
from ..notices import warn
from ..sampling import SamplingPlan
from ..tensor import Array, Dim
from .guidance import Guidance
from .host import Evaluated, denoise

if TYPE_CHECKING:
    from .device import DeviceDenoiser
    from .device_decoder import DeviceDecoder

DENOISER = ("unet", "plain"), ("sampler_step", "plain"), ("sampler_step", "guided")
DECODER = ("vae_decoder", "plain"), ("pixels", "plain")

Denoiser = Callable[[SamplingPlan, Array, Array, Guidance, NoiseSource], Generator[Evaluated]]  # for one UNet


class Loops:
    """The denoising loop and the decoder over a bundle's engines; `close` before these are closed."""

    def __init__(self, bundle: Bundle, engines: Engines) -> None:
        self._bundle, self._engines = bundle, engines
        self._setting_up = threading.Lock()

    @property
    def most_pictures(self) -> int:
        """For which the sampler step has a state at once, in bundles that have one."""
        step = self._bundle.manifest.components.get("sampler_step")
        axes = [] if step is None else [axis for spec in step.graph().inputs for axis in spec.shape]
        return min((axis.max for axis in axes if isinstance(axis, Dim) and axis.symbol == "batch"), default=sys.maxsize)

    def denoiser(self, guidance: Guidance) -> Denoiser:
        """The denoising loop: on the device if all that it takes is there and guidance is linear, else the host's."""
        with self._setting_up:
            on_device = self._device_denoiser
        if on_device is None or guidance.rescale:
            return partial(denoise, self._engines.engine("unet"))
        return on_device

    def decode(self, latents: Array, *, fast: bool = False) -> Decoded:
        """(B, C, h, w) float32 latents → their pictures, with pixels where the device has made them; `fast`: by the
        TAESD, which takes latents as the UNet leaves them.  NumericalError: bad latents, or the decoder overflowed."""
        check_finite(latents, "latents of picture")
        if fast:
            return decode(self._engines.engine("taesd"), latents, 1.0, "tiny decoder (TAESD)")
        with self._setting_up:
            on_device = self._device_decoder
        scaling_factor = self._bundle.manifest.latent.scaling_factor
        if on_device is not None:
            return on_device(latents, scaling_factor)
        return decode(self._engines.engine("vae_decoder"), latents, scaling_factor)

    @cached_property
    def _device_denoiser(self) -> DeviceDenoiser | None:
        engines = self._on_one_device(DENOISER)
        if engines is None:
            return None
        if not takes_slots(engines[1]):
            again = self._bundle.export_again
            warn(f"the bundle's sampler step is an older version's: the host leads the loop, which is slower; {again}")
            return None
        from .device import DeviceDenoiser

        unet, plain, guided = engines
        return DeviceDenoiser(unet, {"plain": plain, "guided": guided})

    @cached_property
    def _device_decoder(self) -> DeviceDecoder | None:
        engines = self._on_one_device(DECODER)
        if engines is None:
            return None
        from .device_decoder import DeviceDecoder

        decoder, pixels = engines
        return DeviceDecoder(decoder, pixels, self._bundle.manifest.latent.pixels)

    def _on_one_device(self, wanted: Iterable[tuple[str, str]]) -> list[DeviceEngine] | None:
        """These engines, if the bundle has them all and all of them run on one device, whatever library runs them."""
        components, found = self._bundle.manifest.components, list[DeviceEngine]()
        if any(name not in components or form not in components[name].graphs for name, form in wanted):
            return None
        for name, form in wanted:
            try:
                engine = self._engines.engine(name, form)
            except DependencyError:  # TensorRT has no engine for it, and there is no other library
                return None
            if not isinstance(engine, DeviceEngine) or (found and engine.device is not found[0].device):
                return None
            found.append(engine)
        return found

    def close(self) -> None:
        for name in ("_device_denoiser", "_device_decoder"):
            if self.__dict__.get(name) is not None:
                self.__dict__.pop(name).close()


def takes_slots(step: Engine) -> bool:
    """Whether a sampler step has a place in the table for each picture; before 0.2.0 there was one for all."""
    return any(spec.name == "index" and isinstance(spec.shape[0], Dim) for spec in step.inputs)
