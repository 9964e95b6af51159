"""What happens to text before it is cut into tokens: canonical composition, blanks, lower case.

The contract is transformers' CLIPTokenizer: NFC, then white space, then lower case, as the tokenizers library does it.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import groupby

# Unicode's White_Space; Python's \s also takes U+001C to U+001F.
BLANKS = re.compile("[\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")

# tokenizers composes by the tables of Unicode 9, to which characters that came later are no marks.  Those of them that
# are, up to Unicode 18, lie in these ranges, which hold nothing that took part in composition before.
LATER = re.compile(
    "([\u05c8\u05c9\u07fd\u0897-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1af0\u1df6-\u1dfa\ua82c"
    "\U000105c9-\U000105e4\U00010d24-\U00010f85\U00011070\U0001133b\U00011382-\U000113d0\U0001145e"
    "\U00011839-\U00011a99\U00011d42-\U0001612f\U00016d63-\U00016ff1\U0001d127\U0001d128\U0001d250-\U0001d281"
    "\U0001e08f-\U0001e6f5]+)"
)

LONG = 1000  # characters from which on a quadratic sort would show


def normalize(text: str) -> str:
    """NFC, each run of white space to one blank, lower case letter by letter.

    "Letter by letter" leaves Greek's final sigma out, the only rule of str.lower() that looks at the neighbours."""
    if not text.isascii():
        parts = LATER.split(text)
        parts[::2] = map(compose, parts[::2])
        text = "".join(parts)
    return BLANKS.sub(" ", text).replace("Σ", "σ").lower()


def compose(text: str) -> str:
    """NFC in linear time.

    Python sorts a run of combining marks by insertion, so a prompt of nothing but marks would take the square of its
    length.  In canonical order, which is NFC's own first step, there is nothing left to sort."""
    if len(text) >= LONG:
        runs = groupby(text, key=lambda char: unicodedata.combining(char) > 0)
        text = "".join(char for _, run in runs for char in sorted(run, key=unicodedata.combining))
    return unicodedata.normalize("NFC", text)
