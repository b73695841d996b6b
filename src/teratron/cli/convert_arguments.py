"""`teratron convert args SCRIPT`: the config that a launch script of Megatron-LM is here."""

from __future__ import annotations

from pathlib import Path


def print_config(script: Path, output: Path | None, overwrite: bool) -> int:
    """Print the config as TOML, or write it into a file."""
    from teratron.checkpoint.megatron.launch import translate_script
    from teratron.config import UserError

    found = translate_script(script)
    text = found.to_toml(str(output or "config.toml"))
    if output is None:
        print(text, end="")
        return 0
    if output.exists() and not overwrite:
        raise UserError(f"{output}: exists: choose another name, or add --overwrite")
    output.write_text(text, "utf-8")
    for note in found.notes:
        print(note)
    print(f"wrote {output}; start it with: {found.command(str(output))}")
    return 0
