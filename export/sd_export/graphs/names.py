"""Names in graphs that say something to whoever builds an engine from them.  Imports nothing."""

from __future__ import annotations

from typing import Final

FLOAT32: Final = "@float32"  # in the names of layers that must compute in float32, for versions that ask by layer
