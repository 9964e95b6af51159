"""What other programs' prompts can say beside words and weights, and this one cannot do.

Encoded as if they were words, such instructions would change the picture without a word, so a prompt that holds one is
refused: what it says, and what that means where it comes from.

    <lora:x:0.8> <hypernet:x:1> <wildcard:x>    AUTOMATIC1111's extra networks, SwarmUI's directives
    [a:b:0.5] [a::10] [b:0.5] [a|b]             AUTOMATIC1111's prompt editing: other words from some step on
    AND  ADDCOMM  ADDROW                        several prompts at once, each over the picture or over a part of it
    {a|b}  __colour__                           Dynamic Prompts: one of several, by chance
    embedding:x                                 ComfyUI's name of a textual inversion
    (a b)++  (a b)1.3  .and( .blend( .swap(     InvokeAI's and compel's weights and blends
    --ar 3:2                                    Midjourney's parameters, AUTOMATIC1111's lines of a prompts file
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import UsageError, one_line

NETWORK = re.compile(r"<(\w+)(?:\[[^\[\]<>]*\])?:[^<>]*>")
NETWORKS = {"lora": "adds a LoRA", "lyco": "adds a LoRA", "hypernet": "adds a hypernetwork"}
OTHER_NETWORK = "an instruction of AUTOMATIC1111 or SwarmUI"

MEANINGS = {
    r"\bAND(?:_[A-Z]+)?\b": "draws several prompts at once; in small letters it is a word",
    r"\bADD(?:COMM|BASE|COL|ROW)\b": "divides the picture between prompts",
    r"(?<!\w)__[\w*/-]+?__(?!\w)": "stands for a word that is drawn by chance",
    r"(?<![\w<])embedding:[\w./\\-]+": "a textual inversion as ComfyUI names it: load it, and write its word alone",
    r"\)(?:\++|-{2,}|\d*\.\d+)(?!\w)": "a weight as InvokeAI writes it, here (word:1.3)",
    r"\.(?:and|blend|swap)\(": "combines prompts in InvokeAI",
    r"(?<!\S)--[a-z][\w-]*": "an option of Midjourney or of AUTOMATIC1111's prompts files",
}
PATTERN = re.compile("|".join(f"({pattern})" for pattern in MEANINGS))
CHOICE = re.compile(r"\{[^{}]*\}")
BRACKETS = re.compile(r"\\.|[()\[\]|:]", re.DOTALL)
NUMBER = re.compile(r"\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?\s*")

MOST_SHOWN = 4  # of the instructions in one prompt
LENGTH_SHOWN = 40


@dataclass(frozen=True)
class Instruction:
    """What a prompt says at `start`, and what it means where it comes from."""

    start: int
    text: str
    meaning: str

    def __str__(self) -> str:
        return f"{one_line(self.text, LENGTH_SHOWN)} ({self.meaning})"


def refuse_instructions(prompt: str, name: str = "prompt") -> None:
    """UsageError that says which instructions a prompt holds; `name` is the argument that it came as."""
    found = find_instructions(prompt)
    if not found:
        return
    shown = [str(instruction) for instruction in found[:MOST_SHOWN]]
    more = [f"and {len(found) - MOST_SHOWN} more"] if len(found) > MOST_SHOWN else []
    raise UsageError(
        f"{name}: not understood: {', '.join([*shown, *more])}",
        accepted="words, (word:1.3), [word], BREAK",
        remedy="write it without, or have prompts taken literally: `prompt_weighting`",
    )


def find_instructions(prompt: str) -> list[Instruction]:
    """All of them, in order.  Linear in the prompt's length, however hostile."""
    meanings = list(MEANINGS.values())
    found = [
        *_networks(prompt),
        *(Instruction(m.start(), m[0], meanings[(m.lastindex or 1) - 1]) for m in PATTERN.finditer(prompt)),
        *(Instruction(m.start(), m[0], "one of these by chance") for m in CHOICE.finditer(prompt) if "|" in m[0]),
        *_edits(prompt),
    ]
    return sorted(found, key=lambda instruction: instruction.start)


def without_networks(prompt: str) -> tuple[str, list[Instruction]]:
    """A prompt without its <lora:…> and the like, which are none of its words, and these."""
    return NETWORK.sub("", prompt).strip(), list(_networks(prompt))


def _networks(prompt: str) -> Iterator[Instruction]:
    for match in NETWORK.finditer(prompt):
        yield Instruction(match.start(), match[0], NETWORKS.get(match[1].lower(), OTHER_NETWORK))


@dataclass
class OpenBracket:
    start: int
    colons: list[int] = field(default_factory=list)
    bar: bool = False


def _edits(prompt: str) -> Iterator[Instruction]:
    """Square brackets that hold, not counting brackets within them, a | or, after a last colon, a number."""
    opened: list[OpenBracket] = []
    for match in BRACKETS.finditer(prompt):
        at, char = match.start(), match[0]
        if char in "([":
            opened.append(OpenBracket(at))
        elif char in ")]":
            if not opened or (prompt[opened[-1].start] == "(") != (char == ")"):
                continue  # it matches nothing, hence is text
            bracket = opened.pop()
            if char == "]" and bracket.bar:
                yield Instruction(bracket.start, prompt[bracket.start : at + 1], "alternates between words")
            elif char == "]" and bracket.colons and NUMBER.fullmatch(prompt, bracket.colons[-1] + 1, at):
                yield Instruction(bracket.start, prompt[bracket.start : at + 1], "changes words at that step")
        elif opened and char == "|":
            opened[-1].bar = True
        elif opened and char == ":":
            opened[-1].colons.append(at)
