r"""AUTOMATIC1111's prompt syntax → fragments of text, each with a weight.

    (word)          weight × 1.1, once more for each further level of brackets
    [word]          weight ÷ 1.1
    (word:1.3)      weight × 1.3
    BREAK           the rest goes to a new chunk of the text encoder; outside brackets only
    \( \) \[ \] \\  the character itself

Behaves as `parse_prompt_attention` in modules/prompt_parser.py of github.com/AUTOMATIC1111/stable-diffusion-webui:
brackets left open reach to the end, closing brackets that match nothing are text, and round and square brackets do not
see each other.  What differs is where the original breaks down: weights that are no number or beyond MAX_WEIGHT are an
error, and so are more than MAX_DEPTH brackets open at once (the time would grow with their square).  Prompt editing
([a:b:0.5], [a|b]) and AND are not read: `foreign` refuses them.
"""

from __future__ import annotations

import re
from itertools import groupby

from ..errors import UsageError

Fragment = tuple[str, float]

BREAK: Fragment = ("BREAK", -1.0)
FACTORS = {"(": 1.1, "[": 1 / 1.1}  # what a pair of brackets does to the weight of its text
CLOSES = {")": "(", "]": "["}
MAX_DEPTH = 100
MAX_WEIGHT = 1000

PATTERN = re.compile(r"\\[()\[\]\\]?|[()\[\]]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")


def parse_weights(prompt: str, name: str = "prompt") -> list[Fragment]:
    """`prompt` as (text, weight) in order; a BREAK is the fragment `BREAK`.  At least one fragment, "" for no text.

    UsageError, about the argument `name`: a weight that is none, too many brackets."""
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where in `texts` the text of each open bracket starts

    def scale(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in PATTERN.finditer(prompt):
        text, number = match[0], match[1]
        bracket = CLOSES.get(text) if number is None else "("
        if text in opened:
            opened[text].append(len(texts))
            _check_depth(len(opened["("]) + len(opened["["]), name)
        elif bracket is not None and opened[bracket]:
            scale(opened[bracket].pop(), FACTORS[bracket] if number is None else _number(number, name))
        else:
            for part, weight in [(text[1:], 1.0)] if text.startswith("\\") else split_breaks(text):
                texts.append(part)
                weights.append(weight)
    for bracket in opened:
        for start in opened[bracket]:
            scale(start, FACTORS[bracket])
    for weight in weights:
        if not abs(weight) <= MAX_WEIGHT:
            raise UsageError(f"{name}: weight", got=weight, accepted=f"-{MAX_WEIGHT} to {MAX_WEIGHT} in all")
    return _joined(texts, weights) or [("", 1.0)]


def split_breaks(text: str) -> list[Fragment]:
    """`text` without syntax, cut at each BREAK; the white space around a BREAK goes with it."""
    first, *others = re.split(r"\bBREAK\b", text)
    fragments = [(first.rstrip() if others else first, 1.0)]
    for i, part in enumerate(others, 1):
        fragments += [BREAK, (part.strip() if i < len(others) else part.lstrip(), 1.0)]
    return fragments


def _joined(texts: list[str], weights: list[float]) -> list[Fragment]:
    """Neighbours of equal weight become one fragment: words must not be cut where an escape was."""
    runs = groupby(zip(texts, weights, strict=True), key=lambda fragment: fragment[1])
    return [("".join(text for text, _ in run), weight) for weight, run in runs]


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{name}: weight", got=text, accepted="a number") from None


def _check_depth(depth: int, name: str) -> None:
    if depth > MAX_DEPTH:
        remedy = r"write \( for a bracket that is meant as text"
        raise UsageError(f"{name}: open brackets", got=depth, accepted=f"at most {MAX_DEPTH}", remedy=remedy)
