"""Prompts that were encoded lately, so that equal ones are encoded once."""

from __future__ import annotations

from collections import OrderedDict

from ..pipeline import Pipeline
from ..prompt import PromptEmbeddings
from ..request import Request

KEPT = 32  # each half a megabyte at Stable Diffusion 1's size


class PromptMemory:
    """`Pipeline.encode_prompts`, remembered.  One thread at a time."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._known: OrderedDict[tuple[object, ...], PromptEmbeddings] = OrderedDict()

    def __call__(self, request: Request) -> PromptEmbeddings:
        """What the request's prompts are encoded to; the arrays are shared by all who asked for them."""
        negative = request.negative_prompts if self._pipeline.guidance(request).on else None
        key = request.prompts, negative, request.prompt_weighting, request.truncate
        if key not in self._known:
            self._known[key] = self._pipeline.encode_prompts(request)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]
