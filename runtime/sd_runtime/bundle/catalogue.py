"""The networks and small graphs that a bundle may hold, with what the engines must know of each.

`networks/` has a file for each network: what its tensors are and who feeds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import BundleError
from ..tensor import TensorSpec


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

FLOAT, SAMPLE, TEXT = "float32", ("float32", (0, 0, 0, 0)), ("float32", (0, 0, 0))  # 0: an axis of any size
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name → dtype, shape

# What a pipeline hands to a graph and takes from it: inputs and outputs.
SIGNATURES: dict[tuple[str, str], tuple[Tensors, Tensors]] = {
    ("text_encoder", "plain"): ({"input_ids": ("int64", (0, 0))}, {"last_hidden_state": TEXT}),
    ("text_encoder", "embeds"): ({"inputs_embeds": TEXT}, {"last_hidden_state": TEXT}),
    ("unet", "plain"): (
        {"sample": SAMPLE, "timestep": (FLOAT, (0,)), "encoder_hidden_states": TEXT},
        {"out_sample": SAMPLE},
    ),
    ("vae_decoder", "plain"): ({"latent_sample": SAMPLE}, {"sample": (FLOAT, (0, 3, 0, 0))}),
    ("taesd", "plain"): ({"latent_sample": SAMPLE}, {"sample": (FLOAT, (0, 3, 0, 0))}),
    ("vae_encoder", "plain"): ({"sample": (FLOAT, (0, 3, 0, 0))}, {"latent_parameters": SAMPLE}),
    ("safety_checker", "plain"): (
        {"clip_input": (FLOAT, (0, 3, 0, 0))},
        {"special_scores": (FLOAT, (0, 3)), "concept_scores": (FLOAT, (0, 17))},
    ),
    ("pixels", "plain"): ({"sample": (FLOAT, (0, 3, 0, 0))}, {"pixels": ("uint8", (0, 0, 0, 3))}),
}
OPTIONAL: dict[str, Tensors] = {"unet": {"timestep_cond": (FLOAT, (0, 0))}}  # inputs that a network may have besides


def check_signature(
    where: str, component: str, form: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> None:
    """BundleError, naming the file `where`, unless a graph has the tensors that pipelines know and no more inputs."""
    if (component, form) not in SIGNATURES:
        return
    needed, made = SIGNATURES[component, form]
    optional = OPTIONAL.get(component, {})
    for kind, specs, known in (("input", inputs, needed), ("output", outputs, made)):
        named = {spec.name: spec for spec in specs}
        absent = sorted(set(known) - set(named))
        further = sorted(set(named) - set(known) - set(optional)) if kind == "input" else []
        if absent or further or len(named) < len(specs):
            got = ", ".join(spec.name for spec in specs)
            raise BundleError(f"{where}: {kind}s of {component}", got=got, accepted=", ".join(known))
        for name, (dtype, shape) in {**known, **optional}.items():
            spec = named.get(name)
            if spec is not None and not (spec.dtype == dtype and fits(spec, shape)):
                accepted = f"{dtype}({', '.join(str(size or 'any') for size in shape)})"
                raise BundleError(f"{where}: {kind} '{name}' of {component}", got=str(spec), accepted=accepted)


def fits(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has as many axes, and those sizes that are not 0."""
    ranges = spec.ranges
    return len(ranges) == len(shape) and all(
        size in (0, high) and size in (0, low) for (low, high), size in zip(ranges, shape, strict=True)
    )


ALWAYS = tuple(name for name, part in CATALOGUE.items() if part.always)
EAGER = tuple(name for name, part in CATALOGUE.items() if part.eager)
