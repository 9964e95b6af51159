"""What `sd_runtime` offers to Python: every name that a public signature shows can be imported from the package."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import sd_runtime

# Names in annotations that are Python's, numpy's or Pillow's; Array is numpy's ndarray by a shorter name.
OTHERS = {
    *(
        "Any",
        "Array",
        "AsyncIterator",
        "Callable",
        "Generator",
        "Iterable",
        "Iterator",
        "Sequence",
        "Mapping",
        "Literal",
        "None",
    ),
    *("Path", "PathLike", "Image", "Unpack", "NDArray"),
}
PUBLIC = ("AsyncPipeline", "Bundle", "Generation", "Pipeline", "Prepared", "Request", "Result", "Scheduler", "Step")
PUBLIC += ("make_request", "save_png")


def annotations(thing: Any) -> set[str]:
    """The capitalised words of a callable's annotations."""
    signature = inspect.signature(thing)
    texts = [str(parameter.annotation) for parameter in signature.parameters.values()]
    texts.append(str(signature.return_annotation))
    bare = [re.sub(r"'[^']*'|\"[^\"]*\"", "", text) for text in texts]
    return {word for text in bare for word in re.findall(r"\b[A-Z]\w+", text)}


@pytest.mark.parametrize("name", sd_runtime.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(sd_runtime, name) is not None and name in dir(sd_runtime)


@pytest.mark.parametrize("name", PUBLIC)
def test_all_names_what_a_signature_shows(name: str) -> None:
    thing = getattr(sd_runtime, name)
    shown = annotations(thing)
    if inspect.isclass(thing):
        members = vars(thing).items()
        shown |= {w for n, m in members if not n.startswith("_") and inspect.isfunction(m) for w in annotations(m)}
    assert shown - OTHERS <= set(sd_runtime.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sd_runtime' has no attribute 'nothing'"):
        sd_runtime.nothing  # noqa: B018
