"""Fine-tuning measured: each task on real data from nothing and from a small pretrained model, beside a baseline that has read nothing.

    python bench/tasks.py --data FOLDER --work FOLDER pretrain            # the three models, once; minutes each
    python bench/tasks.py --data FOLDER --work FOLDER row sentiment       # one row of the table
    python bench/tasks.py --data FOLDER --work FOLDER table               # docs/tasks.md's table from all rows that were run

FOLDER of --data holds the data sets, each in a folder of the name that the table gives.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teratron.data.order import permute

TERATRON = [sys.executable, "-m", "teratron"]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Pretraining:
    """A small model and the text that it reads."""

    preset: str
    languages: tuple[str, ...]
    keys: str


PRETRAININGS = {
    "encoder": Pretraining(
        "bert-tiny",
        ("en",),
        "--model.seq_length 128 --data.tokenizer wordpiece:4096 --train.steps 1500 --optim.warmup_steps 100 --train.eval_every 500",
    ),
    "decoder": Pretraining(
        "shakespeare-char",
        ("en",),
        "--model.layers 2 --model.heads 2 --model.seq_length 128 --model.position rope --data.tokenizer bpe:2048 --data.split 98,2 "
        "--data.isolate_documents true --train.steps 1500 --train.global_batch 32 --optim.lr 3e-3 --optim.beta2 0.98 "
        "--train.eval_every 500",
    ),
    "rewriter": Pretraining(
        "t5-tiny",
        ("en", "ja"),
        "--model.seq_length 128 --data.tokenizer bpe:4096 --train.steps 1500 --train.global_batch 32 --optim.warmup_steps 100 "
        "--train.eval_every 500",
    ),
}


def reviews(data: Path) -> dict[str, Rows]:
    with zipfile.ZipFile(data / "sentence_polarity" / "sentence_polarity.zip") as archive:
        rows = [
            {"text": line.strip(), "label": label}
            for label in ("neg", "pos")
            for line in archive.read(f"sentence_polarity/rt-polarity.{label}").decode("latin-1").splitlines()
            if line.strip()
        ]
    return split(shuffled(rows), 1000)


def sentiment(data: Path) -> dict[str, Rows]:
    return few(reviews(data), 2000)


def requests(data: Path) -> dict[str, Rows]:
    return {name: table(data / "banking77" / f"{name}.csv") for name in ("train", "test")}


def intent(data: Path) -> dict[str, Rows]:
    return few(requests(data), 2000)


def inference(data: Path) -> dict[str, Rows]:
    rows = lines(data / "snli_dev" / "dev.jsonl")
    premises = shuffled(sorted({row["premise"] for row in rows}))
    held = set(premises[: len(premises) // 8])
    return {"train": [row for row in rows if row["premise"] not in held], "test": [row for row in rows if row["premise"] in held]}


def similarity(data: Path) -> dict[str, Rows]:
    pairs = {name: [row for row in rows if row["label"] == "entailment"] for name, rows in inference(data).items()}
    return {name: [{"anchor": row["premise"], "positive": row["hypothesis"]} for row in rows] for name, rows in pairs.items()}


def entities(data: Path) -> dict[str, Rows]:
    from teratron.tasks.finetune.rows import read_table

    names = {"train": "wnut17train.conll", "valid": "emerging.dev.conll", "test": "emerging.test.annotated"}
    return {name: read_table([data / "wnut17" / file]).rows for name, file in names.items()}


def reading(data: Path) -> dict[str, Rows]:
    from teratron.tasks.finetune.rows import read_table

    rows = read_table([data / "xquad_en" / "xquad.en.json"]).rows
    held = set(shuffled(sorted({row["context"] for row in rows}))[:40])
    kept = [{**row, "answers": {"text": [a for a, _ in row["answers"]], "answer_start": [s for _, s in row["answers"]]}} for row in rows]
    return {"train": [row for row in kept if row["context"] not in held], "test": [row for row in kept if row["context"] in held]}


def translation(data: Path) -> dict[str, Rows]:
    def side(language: str, part: str) -> list[str]:
        files = sorted((data / "enja_tanaka").glob(f"{part}.{language}*"))
        return [line.strip() for file in files for line in file.read_text("utf-8").splitlines()]

    return {
        name: [{"source": en, "target": ja} for en, ja in zip(side("en", part), side("ja", part), strict=True)][:12000]
        for name, part in (("train", "train"), ("valid", "dev"), ("test", "test"))
    }


def summarisation(data: Path) -> dict[str, Rows]:
    found = {name: lines(data / "scitldr" / f"{part}.jsonl") for name, part in (("train", "train"), ("test", "dev"))}
    pairs = {name: [{"source": " ".join(row["source"]), "target": row["target"]} for row in rows] for name, rows in found.items()}
    return pairs | {"test": pairs["test"][:200]}


def chat(data: Path) -> dict[str, Rows]:
    talks: Rows = []
    for row in lines(data / "instruct_selfinstruct_seed" / "seed_tasks.jsonl"):
        asked = "\n".join(text for text in (row["instruction"], row["instances"][0]["input"]) if text)
        talks.append({"messages": [said("user", asked), said("assistant", row["instances"][0]["output"])]})
    for dialogue in json.loads((data / "sgd_dialogue" / "dev" / "dialogues_001.json").read_text("utf-8")):
        talks.append({"messages": [said("user" if t["speaker"] == "USER" else "assistant", t["utterance"]) for t in dialogue["turns"]]})
    return split(shuffled(talks), 40)


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def reasoning(data: Path) -> dict[str, Rows]:
    found = {name: lines(data / "gsm8k" / f"{name}.jsonl") for name in ("train", "test")}
    pairs = {name: [{"source": row["question"], "target": row["answer"]} for row in rows] for name, rows in found.items()}
    return pairs | {"test": pairs["test"][:300]}


def choices(data: Path) -> dict[str, Rows]:
    rows = [
        row for name in ("arc_easy", "arc_challenge", "openbook_qa", "piqa") for row in lines(data / "mcq_llmfoundry" / f"{name}.jsonl")
    ]
    return split(shuffled([{"query": row["query"], "choices": row["choices"], "gold": row["gold"]} for row in rows]), 800)


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    task: str
    data: Callable[[Path], dict[str, Rows]]
    source: str
    """Name of the data set."""
    model: str
    metric: str
    options: str = ""
    """Of both runs."""


ROWS = {
    "sentiment": Row("classify", sentiment, "sentence_polarity", "encoder", "accuracy", "--epochs 6 --optim.lr 5e-4"),
    "intent": Row("classify", intent, "banking77", "encoder", "accuracy", "--epochs 12 --optim.lr 1e-3"),
    "inference": Row("classify", inference, "snli_dev", "encoder", "accuracy", "--epochs 3 --optim.lr 5e-4"),
    "entities": Row("tag", entities, "wnut17", "encoder", "f1", "--epochs 8 --optim.lr 1e-3"),
    "reading": Row("answer", reading, "xquad_en", "encoder", "f1", "--epochs 8 --length 128 --stride 64 --optim.lr 5e-4"),
    "similarity": Row("embed", similarity, "snli_dev", "encoder", "mrr", "--epochs 6 --optim.lr 5e-4"),
    "choices": Row("choose", choices, "mcq_llmfoundry", "encoder", "accuracy", "--epochs 3 --length 64 --optim.lr 5e-4"),
    "translation": Row("seq2seq", translation, "enja_tanaka", "rewriter", "bleu", "--epochs 3 --optim.lr 1e-3"),
    "summarisation": Row("seq2seq", summarisation, "scitldr", "rewriter", "rougeL", "--epochs 5 --optim.lr 1e-3"),
    "chat": Row("chat", chat, "instruct_selfinstruct_seed, sgd_dialogue", "decoder", "perplexity", "--epochs 8 --optim.lr 1e-3"),
    "reasoning": Row("seq2seq", reasoning, "gsm8k", "decoder", "answer_perplexity", "--epochs 2 --optim.lr 1e-3 --target-length 100"),
}


def shuffled(items: list[Any]) -> list[Any]:
    import numpy as np

    return [items[place] for place in permute(np.arange(len(items)), len(items), 1)]


def split(rows: Rows, held: int) -> dict[str, Rows]:
    return {"train": rows[held:], "test": rows[:held]}


def few(parts: dict[str, Rows], count: int) -> dict[str, Rows]:
    """With so many rows to learn from: what pretraining is for."""
    return parts | {"train": shuffled(parts["train"])[:count]}


def lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def table(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def strings(value: object) -> Iterable[str]:
    """Every text in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for item in value.values() for text in strings(item))
    elif isinstance(value, list):
        yield from (text for item in value for text in strings(item))


def write_corpus(data: Path, folder: Path, languages: Iterable[str]) -> Path:
    """What the small models read: free text, and the texts of the tasks' training rows without their labels; never a test row."""
    target = folder / f"corpus-{'-'.join(languages)}"
    target.mkdir(parents=True, exist_ok=True)
    with (target / "text.jsonl").open("w", encoding="utf-8") as file:
        for text in corpus(data, set(languages)):
            if text.strip():
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return target


def corpus(data: Path, languages: set[str]) -> Iterable[str]:
    for path in (data / "gutenberg").glob("*.txt"):
        yield from chunks(path.read_text("utf-8").replace("\r", ""))
    yield from chunks(re.sub(r" @([-,.])@ ", r"\1", (data / "wikitext2" / "valid.txt").read_text("utf-8")))
    yield from (row["text"] for row in lines(data / "c4_sample" / "c4_demo.jsonl"))
    yield from (row["query"] for row in lines(data / "mcq_llmfoundry" / "boolq.jsonl"))
    for make, keys in ((reviews, ("text",)), (requests, ("text",)), (inference, ("premise", "hypothesis")), (summarisation, ("source",))):
        found = list(dict.fromkeys(text for row in make(data)["train"] for key in keys for text in strings(row[key])))
        yield from (" ".join(found[start : start + 8]) for start in range(0, len(found), 8))
    yield from (" ".join(strings(row)) for row in reasoning(data)["train"])
    yield from dict.fromkeys(row["context"] for row in reading(data)["train"])
    if "ja" in languages:
        found = [text for key in ("source", "target") for text in (row[key] for row in translation(data)["train"])]
        yield from (" ".join(found[start : start + 8]) for start in range(0, len(found), 8))


def chunks(text: str, size: int = 4000) -> Iterable[str]:
    """A long text in pieces that end with a paragraph."""
    held = ""
    for paragraph in re.split(r"\n\s*\n", text):
        held += paragraph + "\n\n"
        if len(held) > size:
            yield held
            held = ""
    yield held


def pretrain(name: str, data: Path, work: Path) -> Path:
    """A small pretrained model; the same call goes on with it."""
    wanted, run = PRETRAININGS[name], work / f"pretrained-{name}"
    text = work / f"corpus-{'-'.join(wanted.languages)}"
    if not text.is_dir():
        write_corpus(data, work, wanted.languages)
    call([*TERATRON, "train", wanted.preset, "--data.text", str(text), "--run", str(run), *wanted.keys.split()])
    return run


def measure(name: str, data: Path, work: Path) -> dict[str, Any]:
    """Both runs of a row; the scores are kept in WORK/NAME.json."""
    row = ROWS[name]
    model, folder = work / f"pretrained-{row.model}", work / "data" / name
    if not (model / "config.toml").is_file():
        pretrain(row.model, data, work)
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for part, rows in row.data(data).items():
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows), "utf-8")
    files: list[str] = []
    for part, option in (("train", "--data"), ("valid", "--valid"), ("test", "--test")):
        files += [option, f"{folder}/{part}.jsonl"] if (folder / f"{part}.jsonl").is_file() else []
    result: dict[str, Any] = {"metric": row.metric, "seconds": {}}
    for kind, extra in (("nothing", ["--scratch"]), ("pretrained", [])):
        begun = time.perf_counter()
        run = work / f"{name}-{kind}"
        call([*TERATRON, "finetune", row.task, "--model", str(model), *files, "--run", str(run), *row.options.split(), *extra])
        result["seconds"][kind] = time.perf_counter() - begun
        scores = json.loads((run / "scores.json").read_text("utf-8"))
        result[kind] = scores["metrics"] | {"answer_perplexity": {"value": math.exp(least_loss(run))}}
        result["baseline"] = scores["baseline"]
        result["examples"] = scores["examples"]
        result["learnt"] = sum(1 for _ in (folder / "train.jsonl").open(encoding="utf-8"))
    (work / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def least_loss(run: Path) -> float:
    """The best held-out loss of a run."""
    events = (json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return min(event["loss"] for event in events if event["event"] == "eval")


def call(command: list[str]) -> None:
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def print_table(work: Path) -> None:
    """Gains are positive where the pretrained model is better; `answer_perplexity` is that of the held-out tenth of the training rows."""
    print("| task | data | metric | baseline | from nothing | from our pretrained model | gain |")
    print("|---|---|---|---|---|---|---|")
    for name, row in ROWS.items():
        path = work / f"{name}.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text("utf-8"))
        nothing, learnt = (found[kind][row.metric] for kind in ("nothing", "pretrained"))
        dull = found["baseline"].get(row.metric)
        spread = " ({low:.3f} to {high:.3f})".format(**learnt) if "low" in learnt else ""
        print(
            f"| {name} (`{row.task}`) | `{row.source}`, {found['learnt']:,} to learn from, {found['examples']:,} to test | {row.metric} | "
            f"{'' if dull is None else f'{dull:.3f}'} | {nothing['value']:.3f} | {learnt['value']:.3f}{spread} | "
            f"{(learnt['value'] - nothing['value']) * (-1 if 'perplexity' in row.metric else 1):+.3f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="a folder for models and runs")
    parser.add_argument("what", choices=("pretrain", "row", "table"))
    parser.add_argument("names", nargs="*", help=f"pretrain: {', '.join(PRETRAININGS)}; row: {', '.join(ROWS)} (default: all)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.what == "pretrain":
        for name in args.names or PRETRAININGS:
            pretrain(name, args.data, args.work)
    if args.what == "row":
        for name in args.names or ROWS:
            measure(name, args.data, args.work)
    print_table(args.work)


if __name__ == "__main__":
    main()
