"""What a user may choose of a checkpoint.  Imports nothing."""

from __future__ import annotations

from typing import Final, Literal

PredictionType = Literal["epsilon", "v_prediction"]  # of the UNet: the noise, or v of Salimans & Ho 2022
PREDICTION_TYPES: Final[tuple[PredictionType, ...]] = ("epsilon", "v_prediction")
