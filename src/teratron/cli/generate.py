"""`teratron generate`: continue prompts with a trained model."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from teratron.cli.parser import given, text
from teratron.cli.workers import add_nproc, run_workers
from teratron.config import UserError

if TYPE_CHECKING:
    from teratron.checkpoint import LoadedModel
    from teratron.generate import Completion, Request

SUMMARY = "continue a prompt, or a file of prompts, with a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="MODEL", help="a run folder, a checkpoint folder or a Hugging Face folder")
    parser.add_argument(
        "prompt", nargs="?", type=text, metavar="PROMPT", help="text to continue; - reads it from standard input (default: none)"
    )
    parser.add_argument(
        "--chat", type=text, metavar="TEXT", help="give the answer to this of a run of `teratron finetune chat`; beside --device alone"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line (blank lines are skipped), or .jsonl records")
    parser.add_argument(
        "--prompt-key", type=text, default="prompt", metavar="KEY", help="field of a .jsonl record that holds it (default: prompt)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write records of prompt, text, tokens, seed ... into this .jsonl file")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens to add (default: 100, or fewer where positions end)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 = always the likeliest token (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="choose among the K likeliest tokens; 0 = all (default: 0)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="choose among the likeliest tokens that make up P (default: 1)"
    )
    parser.add_argument(
        "--contrastive-k",
        type=int,
        default=0,
        metavar="K",
        help="contrastive search among the K likeliest tokens, such as 4; 0 = none",
    )
    parser.add_argument(
        "--contrastive-alpha", type=float, metavar="A", help="how much it shuns what is like the text before, 0 to 1 (default: 0.6)"
    )
    parser.add_argument("--beams", type=int, default=0, metavar="N", help="beam search with N beams, such as 4; 0 = none")
    parser.add_argument(
        "--length-penalty", type=float, metavar="A", help="of beam search: above 0 favours long texts, below 0 short ones (default: 1)"
    )
    parser.add_argument("--early-stopping", action="store_true", help="of beam search: done when as many texts as beams have ended")
    parser.add_argument(
        "--choice", action="append", type=text, default=[], metavar="TEXT", help="give one of these texts and nothing else; may be repeated"
    )
    parser.add_argument("--regex", type=text, metavar="R", help="give text that matches this regular expression as a whole")
    parser.add_argument("--json-schema", type=Path, metavar="FILE", help="give JSON of the schema in this file")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed gives the same text (default: 0)")
    parser.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="continuations of each prompt: seeds S, S+1, ... or the best beams (default: 1)",
    )
    parser.add_argument(
        "--batch", type=int, default=16, metavar="N", help="continuations made at the same time, each beam counted (default: 16)"
    )
    parser.add_argument(
        "--stop", action="append", type=text, default=[], metavar="TEXT", help="end a continuation before this text; may be repeated"
    )
    parser.add_argument("--tokenizer", metavar="T", help="tokenizer file, folder or `bytes`, instead of the model's own")
    parser.add_argument(
        "--lookup",
        type=int,
        default=0,
        metavar="N",
        help="guess N tokens at a time from the text itself: the same text, sooner (default: 0)",
    )
    parser.add_argument("--draft", metavar="MODEL", help="a small model of the same tokenizer that guesses tokens: the same text, sooner")
    parser.add_argument("--draft-tokens", type=int, metavar="N", help="tokens that it guesses at a time (default: 4)")
    parser.add_argument("--compile", action="store_true", help="compile the step, which takes a minute the first time")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add_nproc(parser, " that share the model")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="numbers of weights and activations (default: fp32; fp64 as trained)")
    parser.add_argument("--no-stream", action="store_true", help="print the text when it is complete")


def run(args: argparse.Namespace) -> int:
    if args.chat is not None:
        return _answer(args)
    _check_output(args.output)  # before the slow imports, as are the files that are read
    schema = None if args.json_schema is None else _text_of(args.json_schema, "--json-schema")
    code = run_workers(args)
    if code is not None:
        return code
    from teratron.parallel.worker import this_worker

    worker = this_worker()
    leads = worker is None or worker.rank == 0
    prompts = list(_prompts(args)) if leads else []
    from teratron.generate import Request, open_source
    from teratron.generate.api import Ways, chosen_by, constraint_of, guessed_by
    from teratron.generate.ranks import joined

    how = chosen_by(Ways(**{name: getattr(args, name) for name in Ways.__annotations__}))  # type: ignore[typeddict-item]
    constraint = constraint_of(args.choice, args.regex, schema)
    with joined(worker, args.device) as (mesh, device), _silent(not leads):
        prompts = json.loads(mesh.all.gather_bytes(json.dumps(prompts).encode())[0])
        opening = device, args.precision, args.tokenizer, mesh
        loaded = open_source(args.source, *opening)
        draft = open_source(args.draft, *opening) if args.draft is not None else None
        ahead = guessed_by(args.lookup, draft, args.draft_tokens)
        request = Request(how, args.max_new_tokens, tuple(args.stop), args.samples, args.batch, constraint, ahead, args.compile)
        if len(prompts) == request.samples == 1 and not (args.output or args.no_stream or args.beams):
            _stream(loaded, prompts[0], request)
        else:
            _complete(loaded, prompts, request, args.output if leads else None)
    return 0


def _answer(args: argparse.Namespace) -> int:
    """Print what a run of chat says, which writes as it was judged."""
    others = sorted(given(args) - {"--chat", "--device"})
    if others or args.prompt is not None:
        beside = others[0] if others else f"the prompt {args.prompt!r}"
        raise UserError(f"--chat: {beside} has no effect, a run of `teratron finetune chat` answers as it was judged: leave it out")
    from teratron.tasks.finetune.use import reply

    print(reply(args.source, [{"role": "user", "content": args.chat}], device=args.device))
    return 0


@contextlib.contextmanager
def _silent(wanted: bool) -> Iterator[None]:
    """Ranks that only share the work say nothing."""
    if not wanted:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _prompts(args: argparse.Namespace) -> Iterator[str]:
    """The prompts that the command line names, in order; an empty one when it names none."""
    if args.prompts is None:
        yield _standard_input() if args.prompt == "-" else args.prompt or ""
        return
    if args.prompt is not None:
        raise UserError(f"a prompt and --prompts {args.prompts} are both given: keep one")
    lines = _text_of(args.prompts, "--prompts").split("\n")
    if not any(map(str.strip, lines)):
        raise UserError(f"--prompts {args.prompts}: holds no prompt; write one a line")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _record(line, args.prompt_key, f"{args.prompts}:{number}") if args.prompts.suffix == ".jsonl" else line


def _text_of(file: Path, option: str) -> str:
    """Of the file that an option names."""
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {file}: cannot be read as UTF-8 text: {error}") from None


def _standard_input() -> str:
    """All of it, without the line end that `echo` adds."""
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt from standard input is not UTF-8 text: {error}") from None


def _record(line: str, key: str, where: str) -> str:
    """The prompt in a line of JSON."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON record: {error}") from None
    prompt = record.get(key) if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise UserError(f"{where}: expected a record with a text under '{key}'; name another field with --prompt-key")
    return prompt


def _check_output(output: Path | None) -> None:
    """Refuse what could not be written, before a model is opened."""
    if output is None:
        return
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output {output}: expected a file in a folder that exists")
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise UserError(f"--output {output}: no permission to write there; choose another place")


def _stream(loaded: LoadedModel, prompt: str, request: Request) -> None:
    """Print a prompt, its continuation as it comes, and the speed."""
    from teratron.generate import Generator

    start, generator = time.perf_counter(), Generator(loaded, request)
    stream = generator.stream(generator.read_all([prompt]), [request.seed])
    print(prompt, end=_between(loaded), flush=True)
    first = None
    for step in stream:
        first = first or time.perf_counter()
        print("".join(piece for _, piece in step), end="", flush=True)
    print(flush=True)
    now, count = time.perf_counter(), len(stream.rows[0].tokens)
    speed = f", {(count - 1) / (now - first):,.0f} tokens/s after the first ({first - start:.2f} s)" if first and count > 1 else ""
    _note(f"{count} tokens{speed}{_unfinished(request, int(not stream.tokens.finished))}")


def _complete(loaded: LoadedModel, prompts: list[str], request: Request, output: Path | None) -> None:
    """Print all continuations under headings, or write them as records; each batch as soon as it is there."""
    from teratron.generate import complete

    start, tokens, cut, total = time.perf_counter(), 0, 0, len(prompts) * request.samples
    results = complete(loaded, prompts, request)
    with open(output, "w", encoding="utf-8") if output else contextlib.nullcontext(sys.stdout) as sink:
        for number, done in enumerate(results, 1):
            tokens, cut = tokens + len(done.tokens), cut + (not done.finished)
            print(_json(done) if output else _shown(done, number, total, _between(loaded)), file=sink, flush=True)
    seconds = time.perf_counter() - start
    written = f"; written to {output}" if output else ""
    _note(f"{tokens:,} tokens in {total} continuations, {tokens / seconds:,.0f} tokens/s{written}{_unfinished(request, cut)}")


def _unfinished(request: Request, count: int) -> str:
    """That texts were cut before they were what they had to be."""
    return f"; {count} cut before the constraint was met: raise --max-new-tokens" if count and request.constraint else ""


def _json(done: Completion) -> str:
    record = {"prompt": done.prompt, "text": done.text, "tokens": done.tokens, "seed": done.seed, "finished": done.finished}
    return json.dumps(record | ({} if done.score is None else {"score": done.score}), ensure_ascii=False)


def _between(loaded: LoadedModel) -> str:
    """What stands between a prompt and its text: an answer is no continuation."""
    return "\n" if loaded.config.family == "encoder_decoder" else ""


def _shown(done: Completion, number: int, total: int, between: str) -> str:
    heading = f"--- {number} of {total}, seed {done.seed}\n" if total > 1 else ""
    return f"{heading}{done.prompt}{between}{done.text}"


def _note(text: str) -> None:
    """A line for people, not part of the text."""
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr)
