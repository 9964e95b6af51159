"""Virtual environments for scripts/check_install: made, filled with pip, measured, and used from outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from install_size import MEGABYTE, REPOSITORY, distributions


class FailedError(Exception):
    """A command ended with another exit code than expected; the message is the line that says why."""


class UnreachableError(Exception):
    """The index that TensorRT's libraries come from cannot be reached."""


class Environment:
    """A virtual environment without pip; that of an `installer` fills it, which is made once."""

    def __init__(self, interpreter: str, folder: Path, installer: Path) -> None:
        self.folder, self.python, self._installer = folder, folder / "bin/python", installer
        run([interpreter, "-m", "venv", "--without-pip", "--clear", folder])

    def pip(self, *arguments: str | Path) -> str:
        """Quiet, so that an error is all that is said."""
        return run([self._installer, "-m", "pip", "--python", self.python, "--quiet", *arguments])

    def packages(self) -> list[str]:
        """What is installed, each as name==version."""
        return self.pip("freeze").split()

    def script(self, name: str, *arguments: str | Path, code: int = 0) -> str:
        """Run a command that a package installed."""
        return run([self.folder / "bin" / name, *arguments], code=code, folder=self.folder)

    def run(self, *arguments: str | Path, code: int = 0) -> str:
        return run([self.python, *arguments], code=code, folder=self.folder)

    def size(self) -> str:
        """Of all that was installed, compiled .pyc files included."""
        return f"{sum(distributions(self.python).values()) / MEGABYTE:.0f} MB"

    def resolve(self, requirement: str) -> list[str]:
        """What `pip install` would install now, each as name==version."""
        report = self.folder / "report.json"
        self.pip("install", "--dry-run", "--report", report, *constraints(requirement), requirement)
        found = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
        return sorted(f"{one['name'].lower().replace('_', '-')}=={one['version']}" for one in found)

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def make_installer(interpreter: str, folder: Path) -> Path:
    """A Python with `build` and an up-to-date pip: 23.3 and newer resolve without downloading."""
    run([interpreter, "-m", "venv", folder])
    python = folder / "bin/python"
    run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip", "build"])
    return python


def constraints(requirement: str) -> list[str | Path]:
    """The versions that the project is tested with, for the export; all else gets the newest, as users do."""
    return ["--constraint", REPOSITORY / "scripts/constraints.txt"] if "export" in requirement else []


def run(command: Sequence[str | Path], *, code: int = 0, folder: Path | None = None) -> str:
    """Its standard output; the standard error of a command that is expected to fail."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=clean)
    if done.returncode == code:
        return done.stderr if code else done.stdout
    if "https://pypi.nvidia.com/ is not reachable" in done.stderr:
        raise UnreachableError("needs https://pypi.nvidia.com, which cannot be reached")
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip() and "WARNING" not in line]
    telling = [line for line in lines if "conflicting dependencies" in line] or lines[-1:]
    raise FailedError(telling[0] if telling else f"exit code {done.returncode}")


def find_python(name: str) -> str | None:
    """An interpreter by its path, or by its version: on PATH or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = (shutil.which(name), shutil.which(f"python{name}"), *pyenv.glob(f"versions/{name}.*/bin/python"))
    for candidate in candidates:
        # pyenv puts a python3.X on PATH for each version that it has; those that are not selected refuse to start
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return str(candidate)
    return None


def has_gpu() -> bool:
    return (
        shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0
    )
