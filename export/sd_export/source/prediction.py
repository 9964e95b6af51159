"""What the UNet of a single file predicts, which its configs would say if it had any.

In this order: what the user says; marks in the file (`v_pred` and `ztsnr`, tensors that trainers leave there); the
.yaml of the same name beside it, CompVis' config (`parameterization: "v"`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_runtime.errors import ExportError, one_line

from ..choices import PredictionType

V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
MARKS = (V_MARK, ZERO_SNR_MARK)
PARAMETERIZATIONS: dict[object, PredictionType] = {"v": "v_prediction", "eps": "epsilon"}
YAML_LIMIT = 1 << 20  # bytes; CompVis' configs have two thousand


@dataclass(frozen=True)
class Prediction:
    """type      None where nothing tells
    zero_snr  the schedule ends without signal (Lin et al. 2023)
    files     names of those beside the checkpoint that were read"""

    type: PredictionType | None
    zero_snr: bool = False
    files: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """What a scheduler's config says of it."""
        fields: dict[str, Any] = {} if self.type is None else {"prediction_type": self.type}
        return fields | ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if self.zero_snr else {})


def find_prediction(path: Path, names: Collection[str], said: PredictionType | None) -> Prediction:
    """Of the file `path`, which holds the tensors `names`.  ExportError: the .yaml cannot be read."""
    marked: PredictionType | None = "v_prediction" if V_MARK in names else None
    written = _from_yaml(path.with_suffix(".yaml")) if said is None and marked is None else None
    files = () if written is None else (path.with_suffix(".yaml").name,)
    return Prediction(said or marked or written, ZERO_SNR_MARK in names, files)


def _from_yaml(path: Path) -> PredictionType | None:
    """What a config of CompVis' says; None where there is none, or it says nothing.

    Where it says nothing, its programs take the noise; but it may be another program's file."""
    if not path.is_file():
        return None
    import yaml  # of the hub's client

    try:
        with path.open("rb") as file:
            text = file.read(YAML_LIMIT + 1)
        if len(text) > YAML_LIMIT:
            raise ExportError(f"{path} is too large", accepted=f"at most {YAML_LIMIT} bytes")
        value = yaml.safe_load(text)
        for key in ("model", "params", "parameterization"):
            value = value.get(key) if isinstance(value, dict) else None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        remedy = "repair or remove it, or say what it would: --prediction-type"
        raise ExportError(f"{path} is not valid YAML ({one_line(str(error))})", remedy=remedy) from error
    if value is not None and value not in PARAMETERIZATIONS:
        raise ExportError(f"{path}: parameterization", got=value, accepted=", ".join(map(str, PARAMETERIZATIONS)))
    return None if value is None else PARAMETERIZATIONS[value]
