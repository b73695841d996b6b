"""Fine-tuning measured: each task on real data from nothing and from a small pretrained model, beside a baseline that has read nothing.

    python bench/tasks.py --data FOLDER --work FOLDER pretrain            # the four models, once; half an hour each on a busy core
    python bench/tasks.py --data FOLDER --work FOLDER row sentiment       # one row of the table
    python bench/tasks.py --data FOLDER --work FOLDER table               # docs/tasks.md's table from all rows that were run

FOLDER of --data holds the data sets, each in a folder of the name that the table gives.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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


SENTENCES = "--epochs 1 --group 32 --optim.lr 1e-3 --optim.warmup_steps 58 --train.steps 240 --train.eval_every 100 --train.patience 0"
"""How the encoder learns vectors of sentences, from texts alone: the fourth model, `sentences`."""


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
    return few(reviews(data), 1000)


def requests(data: Path) -> dict[str, Rows]:
    return {name: table(data / "banking77" / f"{name}.csv") for name in ("train", "test")}


def intent(data: Path) -> dict[str, Rows]:
    """Ten rows of each of 77 classes."""
    parts, held = requests(data), dict[str, Rows]()
    for row in shuffled(parts["train"]):
        held.setdefault(row["category"], []).append(row)
    return parts | {"train": [row for rows in held.values() for row in rows[:10]]}


def inference(data: Path) -> dict[str, Rows]:
    rows = lines(data / "snli_dev" / "dev.jsonl")
    premises = shuffled(sorted({row["premise"] for row in rows}))
    held = set(premises[: len(premises) // 8])
    return {"train": [row for row in rows if row["premise"] not in held], "test": [row for row in rows if row["premise"] in held]}


def inference_few(data: Path) -> dict[str, Rows]:
    return few(inference(data), 2000)


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


def translation_few(data: Path) -> dict[str, Rows]:
    parts = few(translation(data), 2000)
    return parts | {"valid": parts["valid"][:100], "test": parts["test"][:200]}


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
    """Questions that fit into a small model with each of their choices."""
    names = ("arc_easy", "arc_challenge", "openbook_qa", "piqa")
    rows = [row for name in names for row in lines(data / "mcq_llmfoundry" / f"{name}.jsonl")]
    short = [row for row in rows if len(row["query"]) + max(map(len, row["choices"])) < 250]
    return split(shuffled([{"query": row["query"], "choices": row["choices"], "gold": row["gold"]} for row in short]), 800)


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


FEW = "--train.patience 0 --train.eval_every 0"
"""With few rows all are learnt from for a fixed time: a tenth of them would be too few to choose a checkpoint by."""

ROWS = {
    "sentiment": Row("classify", sentiment, "sentence_polarity", "sentences", "accuracy", f"--epochs 3 --optim.lr 1e-3 {FEW}"),
    "intent": Row("classify", intent, "banking77", "sentences", "accuracy", f"--epochs 12 --optim.lr 3e-3 {FEW}"),
    "inference": Row("classify", inference_few, "snli_dev", "sentences", "accuracy", f"--epochs 2 --optim.lr 1e-3 {FEW}"),
    "entities": Row("tag", entities, "wnut17", "encoder", "f1", "--epochs 8 --optim.lr 1e-3"),
    "reading": Row("answer", reading, "xquad_en", "encoder", "f1", "--epochs 8 --length 128 --stride 64 --optim.lr 5e-4"),
    "similarity": Row("embed", similarity, "snli_dev", "encoder", "mrr", "--epochs 6 --optim.lr 5e-4"),
    "choices": Row("choice", choices, "mcq_llmfoundry", "decoder", "accuracy_norm"),
    "translation": Row("seq2seq", translation, "enja_tanaka", "rewriter", "perplexity", "--epochs 3 --optim.lr 1e-3"),
    "translation_few": Row("seq2seq", translation_few, "enja_tanaka", "rewriter", "perplexity", f"--epochs 4 --optim.lr 1e-3 {FEW}"),
    "summarisation": Row(
        "seq2seq", summarisation, "scitldr", "decoder", "perplexity", f"--epochs 1 --optim.lr 1e-3 --target-length 40 {FEW}"
    ),
    "chat": Row("chat", chat, "instruct_selfinstruct_seed, sgd_dialogue", "decoder", "perplexity", "--epochs 8 --optim.lr 1e-3"),
    "reasoning": Row("seq2seq", reasoning, "gsm8k", "decoder", "perplexity", "--epochs 2 --optim.lr 1e-3 --target-length 100"),
}


def shuffled(items: list[Any]) -> list[Any]:
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


def pretrain_sentences(data: Path, work: Path) -> Path:
    """The encoder, which then learns which texts belong together from texts alone; the same call goes on with it."""
    model, run, folder = pretrained("encoder", data, work), work / "pretrained-sentences", work / "data" / "sentences"
    write_rows(folder, split(shuffled(list(pairs(data))), 300))
    files = ["--data", f"{folder}/train.jsonl", "--valid", f"{folder}/test.jsonl"]
    call([*TERATRON, "finetune", "embed", "--model", str(model), *files, "--run", str(run), *SENTENCES.split()])
    return run


def pairs(data: Path) -> Iterable[dict[str, str]]:
    """Two draws of a sentence's words, and neighbouring sentences, of the tasks' training texts."""
    random_words = random.Random(1)
    sources = ((reviews, ("text",)), (requests, ("text",)), (inference, ("premise", "hypothesis")))
    texts = (text for make, keys in sources for text in dict.fromkeys(row[key] for row in make(data)["train"] for key in keys))
    found = [tuple(" ".join(word for word in text.split() if random_words.random() < 0.6) for _ in range(2)) for text in texts]
    longer = [row["query"] for row in lines(data / "mcq_llmfoundry" / "boolq.jsonl")][:1500]
    for text in longer + [row["source"] for row in summarisation(data)["train"]]:
        sentences = [part for part in re.split(r"(?<=[.!?])\s+", text) if 30 < len(part) < 200]
        found += zip(sentences[::2], sentences[1::2], strict=False)
    for first, second in found:
        if min(len(first.split()), len(second.split())) > 1:
            yield {"anchor": first, "positive": second}


def pretrained(name: str, data: Path, work: Path) -> Path:
    """A pretrained model, made where it is not there yet."""
    run = work / f"pretrained-{name}"
    if (run / "report.html").is_file():
        return run
    return pretrain_sentences(data, work) if name == "sentences" else pretrain(name, data, work)


def measure(name: str, data: Path, work: Path) -> dict[str, Any]:
    """Both runs of a row; the scores are kept in WORK/NAME.json."""
    row, folder = ROWS[name], work / "data" / name
    model = pretrained(row.model, data, work)
    write_rows(folder, row.data(data))
    how = ask if row.task == "choice" else finetune
    result = {"metric": row.metric, "learnt": len(lines(folder / "train.jsonl")), **how(row, model, folder, work / name)}
    (work / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def write_rows(folder: Path, parts: dict[str, Rows]) -> None:
    """Each part as FOLDER/PART.jsonl, where they are not there yet."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True)
    for part, rows in parts.items():
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows), "utf-8")


def finetune(row: Row, model: Path, folder: Path, run: Path) -> dict[str, Any]:
    """From drawn weights and from the pretrained ones: metrics of the test rows, and those of the task's baseline."""
    files: list[str] = []
    for part, option in (("train", "--data"), ("valid", "--valid"), ("test", "--test")):
        files += [option, f"{folder}/{part}.jsonl"] if (folder / f"{part}.jsonl").is_file() else []
    result: dict[str, Any] = {"seconds": {}}
    for kind, extra in (("nothing", ["--scratch"]), ("pretrained", [])):
        begun, own = time.perf_counter(), Path(f"{run}-{kind}")
        call([*TERATRON, "finetune", row.task, "--model", str(model), *files, "--run", str(own), *row.options.split(), *extra])
        result["seconds"][kind] = time.perf_counter() - begun
        scores = json.loads((own / "scores.json").read_text("utf-8"))
        result |= {kind: scores["metrics"], "baseline": scores["baseline"], "examples": scores["examples"]}
        if row.metric == "perplexity":
            result[kind]["perplexity"], result["baseline"]["perplexity"] = perplexities(own, folder)
    return result


def perplexities(run: Path, folder: Path) -> tuple[dict[str, float], float]:
    """Of the test rows' targets: that of a fine-tuned run, and that of pairs of tokens counted in the training rows' targets."""
    import torch

    from teratron.tasks.bigram import bigram_loss
    from teratron.tasks.finetune.coder import Coder
    from teratron.tasks.finetune.judge import best_model
    from teratron.tasks.finetune.prepare import load_task, run_tokenizer
    from teratron.tasks.finetune.rows import find_columns, read_table
    from teratron.tasks.finetune.writing import losses

    task, (model, config, _) = load_task(run), best_model(run, torch.device("cpu"))
    coder, examples = Coder(run_tokenizer(run), config.model, task.options.length), {}
    for part in ("train", "test"):
        table = read_table([folder / f"{part}.jsonl"], task.parallel_text)
        examples[part] = task.examples(task.read(find_columns(table, task.columns, {}, task.optional)).rows, coder)
    streams = {part: np.concatenate([one["targets"][one["weights"] > 0] for one in found]) for part, found in examples.items()}
    loss = losses(model, config, examples["test"]).sum() / len(streams["test"])
    return {"value": math.exp(loss)}, math.exp(bigram_loss(streams["train"], streams["test"], config.model.vocab_size))


def ask(row: Row, model: Path, folder: Path, run: Path) -> dict[str, Any]:
    """Multiple choice by likelihood: nothing is learnt for it."""
    call([*TERATRON, "eval", str(model), "choice", "--data", f"{folder}/test.jsonl", "--out", str(run)])
    found = json.loads((run / "eval.json").read_text("utf-8"))["results"][0]
    chance = {row.metric: found["facts"]["chance"]}
    return {"learnt": 0, "pretrained": found["metrics"], "baseline": chance, "examples": found["count"]}


def call(command: list[str]) -> None:
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def print_table(work: Path) -> None:
    """Gains are positive where the pretrained model is better."""
    print("| task | data | metric | baseline | from nothing | from our pretrained model | gain |")
    print("|---|---|---|---|---|---|---|")
    for name, row in ROWS.items():
        path = work / f"{name}.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text("utf-8"))
        learnt, dull = found["pretrained"][row.metric], found["baseline"][row.metric]
        nothing = found["nothing"][row.metric]["value"] if "nothing" in found else None
        spread = " ({low:.3f} to {high:.3f})".format(**learnt) if "low" in learnt else ""
        gain = (learnt["value"] - (dull if nothing is None else nothing)) * (-1 if row.metric == "perplexity" else 1)
        print(
            f"| {name} (`{row.task}`) | `{row.source}`, {found['learnt']:,} to learn from, {found['examples']:,} to test | {row.metric} | "
            f"{dull:.3f} | {'' if nothing is None else f'{nothing:.3f}'} | {learnt['value']:.3f}{spread} | {gain:+.3f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="a folder for models and runs")
    parser.add_argument("what", choices=("pretrain", "row", "table"))
    parser.add_argument("names", nargs="*", help=f"pretrain: {', '.join(PRETRAININGS)}, sentences; row: {', '.join(ROWS)} (default: all)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.what == "pretrain":
        for name in args.names or (*PRETRAININGS, "sentences"):
            pretrained(name, args.data, args.work)
    if args.what == "row":
        for name in args.names or ROWS:
            measure(name, args.data, args.work)
    print_table(args.work)


if __name__ == "__main__":
    main()
