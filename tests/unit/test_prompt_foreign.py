"""Instructions of other programs in a prompt are refused in one line and never drawn as words."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sd_runtime import Pipeline, UsageError
from sd_runtime.prompt.foreign import find_instructions, refuse_instructions, without_networks

INSTRUCTIONS = [
    ("a castle <lora:stormy:0.8>", "<lora:stormy:0.8>", "adds a LoRA"),
    ("<lyco:x:1:1> a castle", "<lyco:x:1:1>", "adds a LoRA"),
    ("a castle <hypernet:anime:0.5>", "<hypernet:anime:0.5>", "adds a hypernetwork"),
    ("a <wildcard:colours> castle", "<wildcard:colours>", "an instruction of AUTOMATIC1111 or SwarmUI"),
    ("a <fromto[0.5]:cat,dog>", "<fromto[0.5]:cat,dog>", "an instruction of AUTOMATIC1111 or SwarmUI"),
    ("a [cat:dog:0.5] here", "[cat:dog:0.5]", "changes words at that step"),
    ("a [dog:10]", "[dog:10]", "changes words at that step"),
    ("a [cat::0.25]", "[cat::0.25]", "changes words at that step"),
    ("a [: big dog : .5 ]", "[: big dog : .5 ]", "changes words at that step"),
    ("a [(cat:1.2):dog:0.5]", "[(cat:1.2):dog:0.5]", "changes words at that step"),
    ("([cat|dog]:1.2)", "[cat|dog]", "alternates between words"),
    ("a cat AND a dog", "AND", "draws several prompts at once; in small letters it is a word"),
    ("a cat AND_PERP a dog", "AND_PERP", "draws several prompts at once; in small letters it is a word"),
    ("sky ADDROW sea", "ADDROW", "divides the picture between prompts"),
    ("a {red|blue} cat", "{red|blue}", "one of these by chance"),
    ("a {2$$red|blue|green} cat", "{2$$red|blue|green}", "one of these by chance"),
    ("a __colours/warm__ cat", "__colours/warm__", "stands for a word that is drawn by chance"),
    (
        "a cat, embedding:EasyNegative",
        "embedding:EasyNegative",
        "a textual inversion as ComfyUI names it: load it, and write its word alone",
    ),
    ("a (red)++ cat", ")++", "a weight as InvokeAI writes it, here (word:1.3)"),
    ("a (red)1.3 cat", ")1.3", "a weight as InvokeAI writes it, here (word:1.3)"),
    ('("a", "b").blend(1,1)', ".blend(", "combines prompts in InvokeAI"),
    ("a cat --ar 3:2", "--ar", "an option of Midjourney or of AUTOMATIC1111's prompts files"),
]


@pytest.mark.parametrize(("prompt", "text", "meaning"), INSTRUCTIONS)
def test_what_is_refused_is_named_with_its_meaning(prompt: str, text: str, meaning: str) -> None:
    (found,) = find_instructions(prompt)
    assert (found.text, found.meaning) == (text, meaning)
    assert prompt[found.start :].startswith(text)
    with pytest.raises(UsageError) as error:
        refuse_instructions(prompt, "negative_prompt")
    assert str(error.value).startswith(f"negative_prompt: not understood: {text[:39]}")


@pytest.mark.parametrize(
    "prompt",
    [
        "a photo of a cat", "a (very) [odd] ((prompt)) BREAK [[dog]]", "(a cat:1.3)", "[a cat: with a hat]",
        r"\[a:b:0.5\]", r"\[a|b\]", "a|b", "(a|b)", "a <thing> on a table", "<|endoftext|>", "rock and roll", "BRAND",
        "HANDS, SANDY", "a -- b", "16:9", "f/1.8", "time 10:30", "[", "]:0.5]", "a_b __ c", "{a}", "C++",
        "1 < 2: 3 > 2", "(cat:-1.3)", "(cat)", "a [(b|c)] d", "http://x.y/z",
    ],
)  # fmt: skip
def test_words_and_weights_are_none(prompt: str) -> None:
    assert find_instructions(prompt) == []
    refuse_instructions(prompt)


def test_several_are_named_in_order_and_not_endlessly() -> None:
    with pytest.raises(UsageError) as error:
        refuse_instructions("[a|b] <lora:" + "x" * 90 + ":1> AND [a:b:3] --ar AND")
    assert str(error.value) == (
        f"prompt: not understood: [a|b] (alternates between words), <lora:{'x' * 33}… (adds a LoRA), AND (draws "
        "several prompts at once; in small letters it is a word), [a:b:3] (changes words at that step), and 2 more: "
        "accepted words, (word:1.3), [word], BREAK; "
        "write it without, or have prompts taken literally: `prompt_weighting`"
    )


@given(st.text(st.sampled_from("ab[](){}<>|:\\0.5 _AND-+\n\x1b"), max_size=60))
def test_any_text_is_searched(prompt: str) -> None:
    for found in find_instructions(prompt):
        assert prompt[found.start :].startswith(found.text)
        assert "\n" not in str(found) and "\x1b" not in str(found)
    kept, networks = without_networks(prompt)
    assert len(networks) + len(kept) <= len(prompt) or not networks


@pytest.mark.parametrize(
    "unit", ["[", "<a", "<a[", "<a:", "{", "{|", "__", "__a", "--a", "[a:", ")+", "(", "[]:", "<" * 9]
)
def test_hostile_prompts_take_linear_time(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    started = time.perf_counter()
    find_instructions(text)
    assert time.perf_counter() - started < 2


def test_networks_are_taken_out() -> None:
    kept, networks = without_networks("a castle <lora:stormy:0.8>, night <hypernet:y:1>")
    assert kept == "a castle , night"
    assert [network.text for network in networks] == ["<lora:stormy:0.8>", "<hypernet:y:1>"]


def test_a_pipeline_refuses_before_a_network_runs(pipe: Pipeline) -> None:
    for arguments in ({"prompt": "a star AND a ring"}, {"prompt": "a star", "negative_prompt": "<lora:x:1>"}):
        with pytest.raises(UsageError, match=r"prompt: not understood: (AND|<lora:x:1>) \("):
            pipe(**arguments, num_inference_steps=1)  # type: ignore[arg-type]


def test_literal_prompts_are_words_whatever_they_say(pipe: Pipeline) -> None:
    result = pipe("a [red|blue] star <lora:x:1>", num_inference_steps=1, prompt_weighting=False)
    assert result.parameters[0].extra["Emphasis"] == "None"
