"""How to call this program again: the start of every command line that a message suggests."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """What the user's shell knows this program as: `teratron` where it is on the path, else the file that was started.

    Where that file is not the installed script, as with `python -m teratron` or a script of the user's, it is the interpreter and
    the module.
    """
    if shutil.which("teratron"):
        return "teratron"
    if Path(sys.argv[0]).name == "teratron":
        return shlex.quote(sys.argv[0])
    return f"{shlex.quote(sys.executable)} -m teratron"
