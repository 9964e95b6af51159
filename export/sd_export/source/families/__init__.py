"""Which kinds of checkpoint there are: one file a family, and what is none of them.

FAMILIES   the list; a new family is a file here and a line there
base       what a family's file says of it
check      refuses what no family draws
refused    what is refused, by what it is recognised, and what it is called
"""

from __future__ import annotations

from . import few_steps, lcm, sd1, sd2, turbo
from .base import Configs, Family

# The first that recognises a checkpoint has it.
FAMILIES = (lcm.FAMILY, turbo.FAMILY, few_steps.FAMILY, sd2.FAMILY, sd1.FAMILY)

# The same networks in sizes that nobody published, such as the demo's.
OWN_SIZE = Family("Stable Diffusion of its own size", lambda name, configs: True)


def recognise(name: str, configs: Configs) -> Family:
    """The family of a checkpoint that `check` let pass; `name` is what its bundle is called."""
    return next((family for family in FAMILIES if family.recognises(name, configs)), OWN_SIZE)
