"""The `teratron` command: finds the verb, reads its arguments, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import select
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from teratron import __version__
from teratron.cli.help import key_help
from teratron.config import UserError, key_names, nearest
from teratron.config.arguments import split_overrides

VERBS = {
    "demo": "teratron.cli.demo",
    "tokenizer": "teratron.cli.tokenizer",
    "data": "teratron.cli.data",
    "train": "teratron.cli.train",
    "generate": "teratron.cli.generate",
}
"""Each verb's module. It defines `SUMMARY` (a line of text), `add_arguments(parser)` and `run(args) -> int`; `TAKES_KEYS = True`
when it also takes `--section.key value`, which arrive as `args.overrides`. It is imported only when its verb is typed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, by default the process's own.

    Returns the exit code: the verb's; 2 after a `UserError`, printed on one line; 130 after Ctrl-C; 141 when the reader of the
    output has gone. Any other exception is a defect and keeps its traceback.
    """
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"teratron: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("teratron: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 141


def _run(argv: list[str]) -> int:
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help", "--version"):
        print(_overview() if verb != "--version" else f"teratron {__version__}")
        return 0
    if verb.startswith("-"):
        raise UserError(f"unknown option '{verb}'{nearest(verb, ['--help', '--version'])}; a verb comes first: {', '.join(VERBS)}")
    if verb not in VERBS:
        raise UserError(f"unknown verb '{verb}'{nearest(verb, VERBS)}; verbs: {', '.join(VERBS)}")
    module = importlib.import_module(VERBS[verb])
    args = _parse(verb, module, argv[1:])
    return 0 if args is None else int(module.run(args))


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {_summary(module)}" for verb, module in VERBS.items()]
    return "\n".join(
        [
            "usage: teratron VERB [options]",
            "",
            "Trains transformer language models of any size, from a laptop's CPU to many GPUs.",
            "",
            "verbs:",
            *lines,
            "",
            "`teratron VERB --help` tells a verb's options; `teratron --version` prints the version.",
        ]
    )


def _summary(module: str) -> str:
    """A module's SUMMARY, read from its source: importing every verb would cost seconds."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    for statement in ast.parse(Path(spec.origin).read_text("utf-8")).body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id="SUMMARY")], value=ast.Constant(value=str(text)))
                | ast.AnnAssign(target=ast.Name(id="SUMMARY"), value=ast.Constant(value=str(text)))
            ):
                return text
    raise AttributeError(f"{module} has no SUMMARY = '...'")


def _parse(verb: str, module: ModuleType, arguments: list[str]) -> argparse.Namespace | None:
    """A verb's arguments; None when they asked for help, which has then been printed."""
    takes_keys = bool(getattr(module, "TAKES_KEYS", False))
    parser = Parser(
        prog=f"teratron {verb}",
        description=module.SUMMARY,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        with_keys=takes_keys,
    )
    module.add_arguments(parser)
    overrides: dict[str, object] = {}
    if takes_keys and not {"-h", "--help"} & set(arguments):
        overrides, arguments = split_overrides(arguments)
    try:
        args = parser.parse_args(arguments)
    except SystemExit:
        return None
    if takes_keys:
        args.overrides = overrides
    return args


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError`, and knows the nearest right name of an unknown option."""

    def __init__(self, *args: Any, with_keys: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.with_keys = with_keys

    def format_help(self) -> str:
        return super().format_help() + (key_help() if self.with_keys else "")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Leaves nothing over: a subcommand's parser too refuses here, where its own options are known."""
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            option = next((argument for argument in rest if argument.startswith("-")), None)
            if option is None:
                self.error(f"unexpected argument '{rest[0]}'")
            known = [*self._option_string_actions, *(f"--{name}" for name in key_names() if self.with_keys)]
            self.error(f"unknown option '{option}'{nearest(option, known)}")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` tells the options")


def _reader_is_gone() -> bool:
    """Whether standard output is the broken pipe; if so, what is still buffered goes nowhere, so that exit is quiet."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True
