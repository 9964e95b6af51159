"""The networks and small graphs that a bundle may hold, with what the engines must know of each.

`networks/` has a file for each network: what its tensors are and who feeds it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One component of a bundle.

    always    every picture needs it
    eager     it is loaded with the bundle, not when it is first asked for
    forms     the forms of its graph that a picture asks for
    any_rows  whoever runs it gives it as many rows at once as its engine takes
    """

    always: bool = False
    eager: bool = False
    forms: tuple[str, ...] = ("plain",)
    any_rows: bool = False


CATALOGUE: dict[str, Part] = {
    "text_encoder": Part(always=True, eager=True, any_rows=True),
    "unet": Part(always=True, eager=True),
    "vae_decoder": Part(always=True, eager=True),
    "vae_encoder": Part(),
    "safety_checker": Part(any_rows=True),
    "taesd": Part(),
    "sampler_step": Part(always=True, forms=("guided", "plain")),  # guidance and a row of the plan, on a device
    "pixels": Part(always=True),  # samples to the bytes of a picture, on a device
}

ALWAYS = tuple(name for name, part in CATALOGUE.items() if part.always)
EAGER = tuple(name for name, part in CATALOGUE.items() if part.eager)
