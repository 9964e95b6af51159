"""AUTOMATIC1111's prompt syntax.  The first cases are those its own documentation gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sd_runtime.errors import UsageError
from sd_runtime.prompt.weights import BREAK, MAX_DEPTH, parse_weights

DOCUMENTED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
}
FURTHER = {
    "": [("", 1.0)],
    "()": [("", 1.0)],
    "[word]": [("word", 1 / 1.1)],
    "[[word]]": [("word", 1 / 1.1 / 1.1)],
    "(a:1.5": [("a:1.5", 1.1)],
    "a:1.5)": [("a:1.5)", 1.0)],
    "[a:1.5]": [("a:1.5", 1 / 1.1)],
    "(a : 1.5 )": [("a ", 1.5)],
    "(a:-0.5)": [("a", -0.5)],
    "(a:b:2)": [("a:b", 2.0)],
    "(a [b) c]": [("a ", 1.1), ("b", 1.1 * (1 / 1.1)), (" c", 1 / 1.1)],
    "a ) b ] c": [("a ) b ] c", 1.0)],
    r"\\ \a \( \) \[ \]": [(r"\ a ( ) [ ]", 1.0)],
    "a\\": [("a", 1.0)],
    "a BREAK b": [("a", 1.0), BREAK, ("b", 1.0)],
    "a\n BREAK  BREAK b": [("a", 1.0), BREAK, ("", 1.0), BREAK, ("b", 1.0)],
    " a BREAK\tb ": [(" a", 1.0), BREAK, ("b ", 1.0)],
    "BREAK": [("", 1.0), BREAK, ("", 1.0)],
    "BREAKFAST, Break, aBREAK": [("BREAKFAST, Break, aBREAK", 1.0)],
    "(a:2)BREAK b": [("a", 2.0), ("", 1.0), BREAK, ("b", 1.0)],
}


@pytest.mark.parametrize(("prompt", "expected"), {**DOCUMENTED, **FURTHER}.items())
def test_known_answers(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert parse_weights(prompt) == expected


@settings(derandomize=True)
@given(st.text(st.characters(exclude_characters="()[]:\\"), max_size=50).filter(lambda text: "BREAK" not in text))
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert parse_weights(text) == [(text, 1.0)]


@settings(derandomize=True)
@given(st.text("ab ()[]:\\1.", max_size=40))
def test_escaped_text_is_literal(text: str) -> None:
    escaped = "".join("\\" + char if char in "()[]\\" else char for char in text)
    assert parse_weights(escaped) == [(text, 1.0)]


@pytest.mark.parametrize("prompt", ["(a:.)", "(a:1.2.3)", "(a:..)"])
def test_weight_that_is_no_number(prompt: str) -> None:
    with pytest.raises(UsageError, match=r"^prompt: weight: got .* accepted a number$"):
        parse_weights(prompt)


@pytest.mark.parametrize("prompt", ["(a:1001)", "((a:100):11)", f"(a:{'9' * 400})", f"(({'(a' * 90}:100)"])
def test_weight_too_large(prompt: str) -> None:
    with pytest.raises(UsageError, match=r"^prompt: weight: got \S+ accepted -1000 to 1000 in all$"):
        parse_weights(prompt)


def test_many_brackets_are_refused_not_slow() -> None:
    with pytest.raises(UsageError, match=rf"open brackets: got {MAX_DEPTH + 1}, accepted at most {MAX_DEPTH}"):
        parse_weights("(a" * 50_000)


@pytest.mark.parametrize("unit", ["(a)", "[b", " ", "BREAK ", ":1", "\\", ")", "(a:1.1)"])
def test_long_prompts(unit: str) -> None:
    """100 kB come through (or are refused), whatever they repeat; quadratic time would show as minutes."""
    try:
        fragments = parse_weights(unit * (100_000 // len(unit)))
    except UsageError as error:
        assert "open brackets" in str(error)
    else:
        assert fragments
