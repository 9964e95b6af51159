"""`python -m sd_runtime` is sd-run."""

import sys

from .cli.run import main

if __name__ == "__main__":
    sys.exit(main())
