"""The errors of this project, and nothing else: this module imports nothing of ours.

    SDError                      every error that we raise on purpose
    ├── UsageError               what the caller asked for cannot be            exit code 2, also a ValueError
    ├── DependencyError          an optional library is not installed           exit code 1, also an ImportError
    ├── BundleError              a bundle is missing, damaged or not understood exit code 1
    ├── ExportError              a checkpoint cannot be read or exported        exit code 1
    ├── EngineError              an engine cannot be loaded or run              exit code 1
    │   └── OutOfMemoryError     ... because device or host memory ran out      also a MemoryError
    ├── NumericalError           NaN or infinity where numbers should be        exit code 1
    ├── ParityError              an output is too far from its reference        exit code 1
    ├── OverloadedError          a service's queue is full                      exit code 1
    ├── DeadlineError            a request was not done at its deadline         exit code 1
    └── CancelledError           a request was cancelled, or its service closed exit code 1

Every message says what went wrong and, where they exist, what was got, what would have been accepted, and the remedy:

    width: got 513, accepted multiples of 8 from 64 to 1024; nearest: 512
"""

from __future__ import annotations

from typing import ClassVar


def printable(text: str) -> str:
    """`text` on one line, with nothing in it that acts: line ends, terminal escapes, marks that turn the direction of
    writing, invisible characters and lone surrogates stand there by their number.  All that is said goes through here.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(value: object, limit: int = 80) -> str:
    """`value` as `printable` text, shortened to `limit` characters: hostile input must not flood a log."""
    text = value if isinstance(value, str) else repr(value)
    text = printable(text[: limit * 2])
    return text if len(text) <= limit else text[: limit - 1] + "…"


EXPORT_IN_FP32 = "export the bundle again in float32: sd-export --precision fp32"  # against overflow in float16


class SDError(Exception):
    """Base of all our errors: `what` happened, what was `got`, what is `accepted`, and the `remedy`."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self, what: str, *, got: object = None, accepted: str | None = None, remedy: str | None = None
    ) -> None:
        self.what, self.got, self.accepted, self.remedy = what, got, accepted, remedy
        parts = [f"got {one_line(got)}"] if got is not None else []
        if accepted is not None:
            parts.append(f"accepted {accepted}")
        message = f"{what}: {', '.join(parts)}" if parts else what
        super().__init__(printable(f"{message}; {remedy}" if remedy else message))


class UsageError(SDError, ValueError):
    """An argument or flag is out of range, unknown, or contradicts another."""

    exit_code = 2


class DependencyError(SDError, ImportError):
    """A library that this path needs is not installed; the remedy names the extra."""


class BundleError(SDError):
    """A bundle is missing, incomplete, damaged, or of a schema that this version does not read."""


class ExportError(SDError):
    """A checkpoint cannot be found, read, converted or traced."""


class EngineError(SDError):
    """An engine cannot be loaded, or was handed tensors that it does not take, or failed while running."""


class OutOfMemoryError(EngineError, MemoryError):
    """Memory ran out while an engine was loaded or run; nothing of the failed call is kept."""


class NumericalError(SDError):
    """A stage produced NaN or infinity; names the stage and, in the denoising loop, the step."""


class ParityError(SDError):
    """A bundle computes something else than the checkpoint that it was made from; names the first output beyond its
    limit."""


class OverloadedError(SDError):
    """A service's queue is full; in about `retry_after` seconds, by its measured speed, there is room again."""

    def __init__(self, waiting: int, limit: int, retry_after: float) -> None:
        self.retry_after = max(retry_after, 1.0)
        remedy = f"try again in {self.retry_after:.0f} s"
        super().__init__("requests in the queue", got=waiting, accepted=f"fewer than {limit}", remedy=remedy)


class DeadlineError(SDError):
    """A request was not done at its deadline; no step of it is run any more."""


class CancelledError(SDError):
    """A request was cancelled, or its service was closed before it was done."""
