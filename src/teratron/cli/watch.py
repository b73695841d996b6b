"""`teratron watch`: a run on a page of the terminal, live."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

SUMMARY = "show how a run is doing, live, also from another machine that sees its folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--once", action="store_true", help="print one page and end")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    from teratron.tasks.watch import Watcher

    watcher = Watcher(args.run)
    if args.once:
        Console().print(watcher.page(time.time()))
        return 0
    with Live(watcher.page(time.time()), auto_refresh=False) as live:
        while watcher.state(time.time()).live:
            time.sleep(1)
            live.update(watcher.page(time.time()), refresh=True)
    return 0
