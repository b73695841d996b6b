"""The argument parser of every verb: mistakes become one-line errors with the nearest right name."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from teratron.cli.help import key_help
from teratron.config import UserError, key_names, nearest


def text(argument: str) -> str:
    """The `type` of an argument that is text and no name of anything: it may be empty, and must be valid Unicode."""
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"character {error.start} is not UTF-8; give text in UTF-8") from None
    return argument


def given(args: argparse.Namespace) -> set[str]:
    """The options that stand on a verb's command line, such as `--seed`, whatever their values."""
    return {word.partition("=")[0] for word in args.command_line if word.startswith("--")}


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError`, knows the nearest right name of an unknown option, and refuses empty values."""

    def __init__(self, *args: Any, with_keys: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.with_keys = with_keys

    def format_help(self) -> str:
        return super().format_help() + (key_help() if self.with_keys else "")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Leaves nothing over: a subcommand's parser too refuses here, where its own options are known."""
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            option = next((argument for argument in rest if argument.startswith("-") and argument != "-"), None)
            if option is None or rest[0] == "--":
                self._take_late(namespace, rest)
                return namespace, []
            known = [*self._option_string_actions, *(f"--{name}" for name in key_names() if self.with_keys)]
            self.error(f"unknown option '{option}'{nearest(option, known)}")
        return namespace, rest

    def _take_late(self, namespace: argparse.Namespace, rest: list[str]) -> None:
        """Arguments behind options, which argparse by itself gives to no positional that may be missing."""
        missing = (a for a in self._get_positional_actions() if a.nargs == "?" and getattr(namespace, a.dest) is a.default)
        for argument in rest[rest[0] == "--" :]:
            action = next(missing, None)
            if action is None:
                self.error(f"unexpected argument '{argument}'")
            try:
                setattr(namespace, action.dest, self._get_value(action, argument))
            except argparse.ArgumentError as error:
                self.error(str(error))

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # What a shell makes of an unset variable; as a path it would silently be the current folder.
        if not arg_string and action.type is not text and action.nargs != argparse.PARSER:
            raise argparse.ArgumentError(action, "its value is empty; give one, or leave it out")
        return super()._get_value(action, arg_string)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` tells the options")
