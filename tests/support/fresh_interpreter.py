"""What a fresh interpreter imports."""

from __future__ import annotations

import json
import subprocess
import sys

HELP = """
import contextlib, io
from {module} import main
with contextlib.redirect_stdout(io.StringIO()):
    try:
        main({arguments!r})
    except SystemExit as end:
        assert not end.code
"""

REPORT = "\nimport json, sys; json.dump(sorted(sys.modules), sys.stdout)"


def modules_after(code: str) -> set[str]:
    """The names of all modules that a fresh interpreter holds after `code`, beyond those that it starts with."""

    def loaded(program: str) -> set[str]:
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return set(json.loads(run.stdout.splitlines()[-1]))

    return loaded(code + REPORT) - loaded(REPORT)
