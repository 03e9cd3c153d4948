"""Notebooks -> library: python tests/export.py (make export, and the hook).

This is nbdev_export, and then `__all__` within 120 columns: nbdev wraps the list without counting the name before it.
"""

import re
import textwrap

from nbdev.config import get_config
from nbdev.doclinks import nbdev_export


def wrapped(text: str) -> str:
    "A module's text with its `__all__` in lines of at most 120 columns."
    fill = textwrap.TextWrapper(120, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False).fill
    return re.sub(r"^__all__ = \[.*?\]$", lambda m: fill(" ".join(m[0].split())), text, flags=re.DOTALL | re.MULTILINE)


if __name__ == "__main__":
    nbdev_export()
    for module in get_config().lib_path.glob("[a-z]*.py"):
        text = module.read_text(encoding="utf-8")
        module.write_text(wrapped(text), encoding="utf-8")
