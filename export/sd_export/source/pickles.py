"""Checkpoints that are pickles: converted, where the user allows it, by a process that loads nothing but weights.

A pickle can run any code when it is opened.  torch.load(weights_only=True) refuses all but tensors and containers; it
runs in a process of its own, so that what it might do after all is not done here.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

from sd_runtime.errors import ExportError, one_line

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
HOLDS_CODE = 3  # exit code of the child


def is_pickle(name: str | Path) -> bool:
    return Path(name).suffix.lower() in PICKLES


def refuse_pickle(name: str, model: str, remedy: str | None = None) -> ExportError:
    """What is said of a pickle where the user did not allow them; `model`: as the user named it."""
    command = f"sd-export --model {shlex.quote(model)} --allow-pickle"
    return ExportError(
        f"{one_line(name)} is a pickle, which can run code when it is opened",
        accepted=".safetensors",
        remedy=remedy or f"{command} converts it in a process that loads nothing but weights",
    )


class Converted:
    """A folder for converted files, which goes with this object."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sd-lean-converted-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def convert(self, path: Path) -> Path:
        """The weights in the pickle `path`, as a .safetensors.  ExportError: it holds more than that, or is damaged."""
        target = self.folder / f"{len(list(self.folder.iterdir()))}-{path.stem}.safetensors"
        command = [sys.executable, "-m", "sd_export.source.unpickle", str(path.resolve()), str(target)]
        # In our own folder: Python looks for modules where it is started, and a torch.py may lie where the user is
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder)
        if done.returncode == 0:
            return target
        why = one_line((done.stderr.strip().splitlines() or ["no reason given"])[-1], 200)
        if done.returncode == HOLDS_CODE:
            remedy = "take the checkpoint as .safetensors from those who publish it"
            raise ExportError(f"{path} holds more than weights, and is not opened ({why})", remedy=remedy)
        raise ExportError(f"{path} cannot be converted to safetensors ({why})", remedy="fetch it again")
