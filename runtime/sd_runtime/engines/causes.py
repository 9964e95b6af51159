"""What libraries report, for people."""

from __future__ import annotations

import re

from ..errors import one_line

_PLACE = re.compile(r".*Status Message: |/\S+\.(cc|h|cpp):\d+ .*?\)(?: \[with .*?\])? ", re.DOTALL)


def shortened(cause: str) -> str:
    """One line of it, without the place in its own source that ONNX Runtime puts before it."""
    return one_line(_PLACE.sub("", cause.strip()), 500)
