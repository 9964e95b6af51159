"""SchedulerConfig: a diffusers `scheduler_config.json`, read as diffusers reads it, or refused.

Keys that are missing take the default of the class, which differs between classes.  Keys that the class does not know
are ignored but remembered: they count again once the configuration is switched to a class that does know them, as in
diffusers' `Other.from_config(config)`.  A value that would change the result in a way that this runtime does not
compute is an error, never dropped in silence.

Two things are read as diffusers' StableDiffusionPipeline leaves them when it loads a scheduler, not as the scheduler
class alone would.  `steps_offset` is 1, whatever the file says.  A missing `clip_sample` is false, although DDIM and
DDPM would clip the predicted picture to ±1: latents are not bounded by 1.  `clip_sample: true` is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import BundleError, SDError, UsageError, one_line
from .names import SchedulerChoice
from .options import ACCEPTED, CHOICES, REMEDIES, REQUIRED
from .registry import BY_CLASS, SAMPLERS

TYPES = {  # as the fields below are declared → as an error message says it
    "int": "a whole number",
    "float": "a positive number, for a beta below 1",
    "bool": "true, false",
    "str": "a text",
    "tuple[float, ...] | None": "null, or a list of numbers between 0 and 1",
}


@dataclass(frozen=True)
class SchedulerConfig:
    """A sampler and its settings, in diffusers' names; a setting that `class_name` does not have keeps the value below.

    class_name           diffusers' class; of a sampler that diffusers lacks, our own name (`Sampler.class_name`)
    num_train_timesteps  T, how many noise levels the network was trained on
    beta_*               the training noise schedule (see `schedule.training_betas`)
    prediction_type      what the network's output means: epsilon, v_prediction or sample
    original             the JSON text that this was read from, for `switched`
    """

    class_name: str
    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: tuple[float, ...] | None
    prediction_type: str
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    final_sigmas_type: str = "zero"
    algorithm_type: str = ""
    solver_type: str = ""
    solver_order: int = 2
    lower_order_final: bool = True
    euler_at_final: bool = False
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    original: str = field(default="{}", repr=False)

    @classmethod
    def from_bytes(cls, text: bytes) -> SchedulerConfig:
        """A `scheduler_config.json` as it lies on disk; into some, diffusers writes -Infinity, which JSON lacks."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"scheduler_config.json is not valid JSON ({one_line(str(error))})") from error
        if not isinstance(raw, dict):
            raise BundleError("scheduler_config.json", got=type(raw).__name__, accepted="a JSON object")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> SchedulerConfig:
        """The content of a `scheduler_config.json`; BundleError names what is unknown or not supported."""
        class_name = raw.get("_class_name") if isinstance(raw, Mapping) else raw
        sampler = BY_CLASS.get(class_name) if isinstance(class_name, str) else None
        if sampler is None or sampler.diffusers_class is None:
            raise BundleError(
                "scheduler_config.json: _class_name",
                got=class_name,
                accepted=", ".join(other.diffusers_class for other in SAMPLERS if other.diffusers_class),
                remedy="choose a sampler by name: sd-run --list-schedulers shows them",
            )
        corrected = {**raw, "steps_offset": 1} if "steps_offset" in raw else raw
        config = _read(sampler.diffusers_class, corrected, BundleError)
        return replace(config, steps_offset=1) if "steps_offset" in sampler.honoured else config

    def switched(self, choice: SchedulerChoice) -> SchedulerConfig:
        """The same training schedule with another sampler, as diffusers' `Other.from_config(config, **overrides)`; one
        that diffusers lacks reads its options in the same way.

        UsageError if a value in the file cannot be had with that sampler."""
        return _read(choice.class_name, {**json.loads(self.original), **choice.overrides}, UsageError)

    @property
    def label(self) -> str:
        """The name that AUTOMATIC1111 writes into metadata, such as "DPM++ 2M Karras"."""
        presets = BY_CLASS[self.class_name].presets
        settled = [preset for preset in presets if all(getattr(self, k, v) == v for k, v in preset.overrides.items())]
        warp = "Karras" if self.use_karras_sigmas else "Exponential" if self.use_exponential_sigmas else ""
        return f"{(*settled, *presets)[0].label} {warp}".rstrip()


def _read(class_name: str, raw: Mapping[str, Any], error: type[SDError]) -> SchedulerConfig:
    sampler = BY_CLASS[class_name]
    noted = raw.get("_use_default_values")  # diffusers' own note of which keys were not set
    defaulted = noted if isinstance(noted, list) else []
    given = {key: value for key, value in raw.items() if key not in defaulted}
    for key in sampler.fixed:
        if key in given or key in REQUIRED:
            _check_choice(class_name, key, given.get(key), ACCEPTED[key], error)
    values = {key: given.get(key, default) for key, default in sampler.honoured.items()}
    for key in values:
        if key in CHOICES or key in sampler.spellings:
            _check_choice(class_name, key, values[key], CHOICES.get(key) or tuple(sampler.spellings[key]), error)
    values.update({key: meaning[values[key]] for key, meaning in sampler.spellings.items()})
    values = {key: _typed(class_name, key, value, error) for key, value in values.items()}
    _check_together(class_name, values, error)
    return SchedulerConfig(class_name, original=json.dumps(dict(raw), sort_keys=True), **values)


def _check_choice(class_name: str, key: str, value: object, accepted: tuple[object, ...], error: type[SDError]) -> None:
    if not any(value == choice and type(value) is type(choice) for choice in accepted):
        listed = ", ".join("null" if choice is None else str(choice) for choice in accepted)
        raise error(f"{class_name}: {key}", got=value, accepted=listed, remedy=REMEDIES.get(key))


def _typed(class_name: str, key: str, value: Any, error: type[SDError]) -> Any:
    """`value` as the field's type; a null where diffusers allows one for a flag is false."""
    kind = str({f.name: f.type for f in fields(SchedulerConfig)}[key])
    if kind == "bool" and (value is None or isinstance(value, bool)):
        return bool(value)
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 20:
        return value
    most = 1.0 if key.startswith("beta_") else math.inf
    if kind == "float" and isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < most:
        return float(value)
    if key == "trained_betas" and value is None:
        return None
    if key == "trained_betas" and isinstance(value, list) and all(isinstance(b, float) and 0 < b < 1 for b in value):
        return tuple(value)
    raise error(f"{class_name}: {key}", got=value, accepted=TYPES[kind])


def _check_together(class_name: str, values: Mapping[str, Any], error: type[SDError]) -> None:
    """Values that are fine one by one and not together."""
    total, betas = values["num_train_timesteps"], values["trained_betas"]
    if total < 2 or (betas is not None and len(betas) != total):
        raise error(
            f"{class_name}: num_train_timesteps", got=total, accepted="at least 2, and as many as trained_betas"
        )
    if not 1 <= values.get("original_inference_steps", 1) <= total:
        raise error(
            f"{class_name}: original_inference_steps", got=values["original_inference_steps"], accepted=f"1 to {total}"
        )
    if values.get("use_karras_sigmas") and values.get("use_exponential_sigmas"):
        raise error(f"{class_name}: use_karras_sigmas and use_exponential_sigmas", accepted="one of them")
    if values.get("algorithm_type") == "sde-dpmsolver++" and values["solver_order"] == 3:
        raise error(
            f"{class_name}: solver_order", got="3 with sde-dpmsolver++", accepted="1, 2", remedy=REMEDIES["sde"]
        )
    unipc_to_zero = values.get("solver_type") in ("bh1", "bh2") and values["final_sigmas_type"] == "zero"
    if unipc_to_zero and values["solver_order"] > 1 and not values["lower_order_final"]:
        raise error(f"{class_name}: lower_order_final", got="false with final_sigmas_type zero", accepted="true")
