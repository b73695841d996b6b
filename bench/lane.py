"""The process of one contender: `python lane.py JOB.json`, asked on stdin, answering in lines of JSON on stdout."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path

import torch
from job import Gate, Job, keep_freed_memory


def main() -> None:
    job = Job.parse(Path(sys.argv[1]).read_text("utf-8"))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what frameworks print must not look like an answer
    warnings.simplefilter("ignore")
    torch.set_num_threads(job.threads)
    if job.switches:
        keep_freed_memory()
    contender = importlib.import_module(f"contenders.{job.contender}")
    contender.train(job, Gate(job, answers))


if __name__ == "__main__":
    main()
