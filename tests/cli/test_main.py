"""The command line's frame: help without torch, one-line errors with the nearest name, exit codes, keys passed through."""

from __future__ import annotations

import argparse
import errno
import io
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from teratron import UserError, __version__
from teratron.cli import main as cli
from teratron.cli.help import key_help, markdown
from teratron.config import Config, key_names

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A verb `sail` with one positional, one option and the config keys; `ran` holds the arguments that reached it."""
    seen = SimpleNamespace(ran=None, does=lambda: 0)

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("config", nargs="?")
        parser.add_argument("--run", help="run directory")

    def run(args: argparse.Namespace) -> int:
        seen.ran = args
        return int(seen.does())

    module = ModuleType("sail")
    vars(module).update(SUMMARY="go to sea", TAKES_KEYS=True, add_arguments=add_arguments, run=run)
    monkeypatch.setitem(cli.VERBS, "sail", "sail")
    monkeypatch.setitem(sys.modules, "sail", module)
    return seen


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_every_verb_has_its_parts(name: str) -> None:
    code = (
        f"import importlib, sys; m = importlib.import_module({cli.VERBS[name]!r}); assert 'torch' not in sys.modules, 'imports torch';"
        "assert callable(m.add_arguments) and callable(m.run) and len(m.SUMMARY.splitlines()) == 1"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_help_lists_the_verbs_at_once_and_without_torch() -> None:
    start = time.perf_counter()
    result = python(
        "import sys; from teratron.cli.main import main; code = main(['--help']); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    seconds = time.perf_counter() - start
    assert result.returncode == 0, result.stderr
    for name in cli.VERBS:
        assert f"\n  {name} " in result.stdout
    assert seconds < 2.0, "0.7 s is promised; the rest is slack for a busy machine"


def test_no_arguments_print_the_same_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_summary", lambda module: f"about {module}")
    assert cli.main([]) == 0
    alone = capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == alone
    assert "about teratron.cli.train" in alone


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"teratron {__version__}\n"


def test_a_verb_gets_its_arguments_and_the_keys(verb: SimpleNamespace) -> None:
    assert cli.main(["sail", "--model.layers", "2", "--run=d", "--data.text", "a", "b", "--train.compile", "gpt2-124m"]) == 0
    assert (verb.ran.config, verb.ran.run) == ("gpt2-124m", "d")
    assert verb.ran.overrides == {"model.layers": "2", "data.text": ("a", "b"), "train.compile": True}


def test_a_verb_decides_the_exit_code(verb: SimpleNamespace) -> None:
    verb.does = lambda: 7
    assert cli.main(["sail"]) == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sial", "unknown verb 'sial' (did you mean 'sail'?); verbs: "),
        ("--hepl", "unknown option '--hepl' (did you mean '--help'?)"),
        ("sail --rnu d", "unknown option '--rnu' (did you mean '--run'?)"),
        ("sail --layers 3", "unknown option '--layers' (did you mean '--model.layers'?)"),
        ("sail --ru d", "unknown option '--ru'"),
        ("sail --run", "argument --run: expected one argument; `teratron sail --help` tells the options"),
        ("sail a b", "unexpected argument 'b'"),
        ("sail --model.layer 3", "unknown key '--model.layer' (did you mean 'model.layers'?)"),
        ("sail --model.layers", "--model.layers has no value: expected integer"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(verb: SimpleNamespace, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"teratron: error: {message}")
    assert err.count("\n") == 1
    assert verb.ran is None


def test_user_error_is_one_line_and_exits_2(verb: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> int:
        raise UserError("data.text = 'a\nb': no such file")

    verb.does = refuse
    assert cli.main(["sail"]) == 2
    assert capsys.readouterr().err == "teratron: error: data.text = 'a b': no such file\n"


def test_interrupt_exits_130(verb: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> int:
        raise KeyboardInterrupt

    verb.does = interrupt
    assert cli.main(["sail"]) == 130
    assert capsys.readouterr().err == "teratron: interrupted\n"


@pytest.mark.parametrize("defect", [ValueError("a defect"), BrokenPipeError("some socket, while the output is still read")])
@pytest.mark.usefixtures("capfd")
def test_a_defect_keeps_its_traceback(verb: SimpleNamespace, defect: Exception) -> None:
    def fail() -> int:
        raise defect

    verb.does = fail
    with pytest.raises(type(defect)):
        cli.main(["sail"])


@pytest.mark.parametrize("size", [10, 10**6])
def test_a_reader_that_leaves_is_no_error(size: int) -> None:
    code = f"import sys; from teratron.cli import main as cli; cli._overview = lambda: 'x' * {size}; sys.exit(cli.main([]))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), "aaa: File name too long: "),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: "),
        (MemoryError(), "out of memory: "),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    verb: SimpleNamespace, capsys: pytest.CaptureFixture[str], trouble: Exception, message: str
) -> None:
    def fail() -> int:
        raise trouble

    verb.does = fail
    assert cli.main(["sail"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"teratron: error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", "<&- >&- 2>&-"])
def test_lost_streams_leave_no_traceback(redirection: str) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m teratron --version {redirection}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False, env=environment)
    full = "full" in redirection
    assert result.returncode == (2 if full else 0)
    assert result.stderr.count("\n") == (1 if full else 0)
    assert ("error: No space left on device" in result.stderr) == full


def test_output_beyond_the_terminals_encoding_is_escaped(
    verb: SimpleNamespace, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    verb.does = lambda: print("né") or 0
    assert cli.main(["sail"]) == 0
    assert plain.buffer.getvalue() == b"n\\xe9\n"  # type: ignore[attr-defined]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["sail", "a\0b"], "the argument 'a\\x00b' holds a NUL character"),
        (["sail", ""], "argument config: its value is empty"),
        (["sail", "--run", ""], "argument --run: its value is empty"),
        (["sail", "--run="], "argument --run: its value is empty"),
        (["tokenizer", "show", ""], "argument T: its value is empty"),
        (["tokenizer", "show", "bytes", "a\udce9"], "argument TEXT: character 1 is not UTF-8"),
        (["data", "prepare", "a", "--tokenizer", "bytes", "--output", ""], "argument --output: its value is empty"),
        (["data", "prepare", "a", "--tokenizer", "bytes", "--output", "b", "--eod", "\udce9"], "argument --eod: character 0 is not UTF-8"),
        (["data", "prepare", "a", "--tokenizer", "bytes", "--output", "b", "--text-key", "\udce9"], "argument --text-key: character 0"),
    ],
)
def test_arguments_that_name_nothing_are_refused(
    verb: SimpleNamespace, capsys: pytest.CaptureFixture[str], line: list[str], message: str
) -> None:
    assert cli.main(line) == 2
    assert capsys.readouterr().err.startswith(f"teratron: error: {message}")
    assert verb.ran is None


def test_text_may_be_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tokenizer", "show", "bytes", ""]) == 0
    assert "tokens       0" in capsys.readouterr().out


def test_subcommands_name_their_own_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        actions.add_parser("prepare", allow_abbrev=False).add_argument("--workers", type=int)

    module = ModuleType("dock")
    vars(module).update(SUMMARY="", add_arguments=add_arguments, run=lambda args: args.workers)
    monkeypatch.setitem(cli.VERBS, "dock", "dock")
    monkeypatch.setitem(sys.modules, "dock", module)
    assert cli.main(["dock", "prepare", "--workers", "3"]) == 3
    for line, message in {
        "dock prepare --wrokers 3": "unknown option '--wrokers' (did you mean '--workers'?); `teratron dock prepare --help`",
        "dock prepare --workers x": "argument --workers: invalid int value: 'x'",
        "dock prepair": "prepare",
        "dock prepare --model.layers 2": "unknown option '--model.layers'",
    }.items():
        assert cli.main(line.split()) == 2
        assert message in capsys.readouterr().err


def test_verb_help_shows_every_key(verb: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sail", "--model.layers", "2", "--help"]) == 0
    assert verb.ran is None
    text = capsys.readouterr().out
    assert "usage: teratron sail" in text
    assert "run directory" in text
    assert all(f"\n  --{name} " in text for name in key_names())
    assert "[true, false]" in text


@pytest.mark.parametrize("width", [80, 100, 160])
def test_key_help_fits_the_terminal(width: int) -> None:
    lines = key_help(width).splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.split()[:2] == ["--model.layers", str(Config().model.layers)] for line in lines)


def test_config_reference_is_current() -> None:
    assert (ROOT / "docs" / "config.md").read_text("utf-8") == markdown(), "type `make docs`"
