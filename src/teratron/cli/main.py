"""The `teratron` command: finds the verb, reads its arguments, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import ast
import importlib
import io
import os
import select
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from teratron import __version__
from teratron.cli.parser import Parser
from teratron.config import UserError, nearest
from teratron.config.arguments import split_overrides

VERBS = {
    "demo": "teratron.cli.demo",
    "tokenizer": "teratron.cli.tokenizer",
    "data": "teratron.cli.data",
    "train": "teratron.cli.train",
    "finetune": "teratron.cli.finetune",
    "generate": "teratron.cli.generate",
    "eval": "teratron.cli.eval",
    "sweep": "teratron.cli.sweep",
    "range-test": "teratron.cli.range_test",
    "watch": "teratron.cli.watch",
    "bench": "teratron.cli.bench",
    "inspect": "teratron.cli.inspect",
    "convert": "teratron.cli.convert",
}
"""Each verb's module. It defines `SUMMARY` (a line of text), `add_arguments(parser)` and `run(args) -> int`; `TAKES_KEYS = True`
when it also takes `--section.key value`, which arrive as `args.overrides`. It is imported only when its verb is typed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, by default the process's own.

    Returns the exit code: the verb's; 2 after a `UserError`, a refusal of the operating system or a lack of memory, printed on
    one line; 130 after Ctrl-C; 141 when the reader of the output has gone. Any other exception is a defect and keeps its traceback.
    A worker of `teratron.parallel.launch` prints no error: its launcher does, once for all ranks.
    """
    _make_streams_safe()
    # Read when torch loads. Threads that spin for long collapse when other programs use the cores: see docs/decisions.md.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is not None or os.environ.keys().isdisjoint({"RANK", "SLURM_STEP_ID"}):  # by name: this room would load torch
        return _run_telling(arguments)
    from teratron.parallel.worker import launched, supervised

    return supervised(lambda: (_run_refusing if launched() else _run_telling)(arguments))


def _run_telling(arguments: list[str]) -> int:
    """Run a command line; a `UserError` becomes a line on stderr."""
    try:
        return _run_refusing(arguments)
    except UserError as error:
        print(f"teratron: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("teratron: interrupted", file=sys.stderr)
        return 130


def _run_refusing(argv: list[str]) -> int:
    """Run a command line; what the operating system refuses becomes a `UserError`."""
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 141
    except OSError as error:
        _give_up_full_output()
        where = f"{error.filename}: " if error.filename else ""  # without one it was an open file, such as standard output
        message = f"{where}{error.strerror or error}: check the path or redirection, its permissions and the free space"
        raise UserError(message) from error
    except MemoryError:
        raise UserError("out of memory: ask for less at once, such as a smaller batch or model") from None


def _make_streams_safe() -> None:
    """Closed standard streams lead nowhere; what the terminal's encoding lacks is printed as an escape."""
    sys.stdin, sys.stdout, sys.stderr = (
        stream or open(os.devnull, mode)  # noqa: SIM115 (it lives as long as the process)
        for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w"))
    )
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")


def _run(argv: list[str]) -> int:
    for argument in argv:
        if "\0" in argument:
            raise UserError(f"the argument {argument!r} holds a NUL character, which no name or text may have: leave it out")
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
    command_line = [verb, *arguments]
    if takes_keys and not {"-h", "--help"} & set(arguments):
        overrides, arguments = split_overrides(arguments)
    try:
        args = parser.parse_args(arguments)
    except SystemExit:
        return None
    if takes_keys:
        args.overrides = overrides
    args.command_line = command_line
    return args


def _reader_is_gone() -> bool:
    """Whether standard output is the broken pipe; if so, exit is quiet."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    if not poll.poll(0):
        return False
    _discard_output()
    return True


def _give_up_full_output() -> None:
    """Keep what is buffered for standard output if it can be written, else discard it."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()


def _discard_output() -> None:
    """Send what is still buffered nowhere: Python flushes once more at exit, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
