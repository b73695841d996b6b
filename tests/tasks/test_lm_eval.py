"""lm-eval finds the same likelihoods and texts through Teratron as through its own `hf` model of the same weights."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "lm_eval.models.huggingface", reason="lm-eval with its hf model is not installed: pip install 'lm-eval[hf]'", exc_type=ImportError
)

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from teratron.config import UserError
from teratron.tasks.lm_eval import TeratronLM

TEXT = "The quick brown fox jumps over the lazy dog. How vexingly quick daft zebras jump! " * 20
PAIRS = [("The quick", " brown fox"), ("", "The lazy dog"), ("a b ", "c"), ("zebras " * 60, "jump"), ("x", " y z"), ("line\n\n", "next")]


def save_tokenizer(folder: Path, bos: bool) -> int:
    """A byte-level BPE, with a beginning of text if asked for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"] if bos else ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>"} if bos else {"bos_token": special[0], "eos_token": special[0]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def save_model(folder: Path, family: str) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    vocab = save_tokenizer(folder, bos=family == "llama")
    torch.manual_seed(0)
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=64, initializer_range=0.2, **sizes))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[Any, Any]:
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)
    return TeratronLM(str(folder), batch_size=3, device="cpu"), theirs


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def test_likelihoods_equal_those_of_hf(models: tuple[Any, Any]) -> None:
    ours, theirs = (model.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True) for model in models)
    for (a, a_greedy), (b, b_greedy) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=2e-6)
        assert a_greedy == b_greedy


def test_rolling_likelihoods_equal_those_of_hf(models: tuple[Any, Any]) -> None:
    texts = [(" ".join(random.Random(0).sample(TEXT.split(), 120)),), ("short",), (TEXT[:300],)]
    ours, theirs = (model.loglikelihood_rolling(asked("loglikelihood_rolling", *texts), disable_tqdm=True) for model in models)
    assert ours == pytest.approx(theirs, rel=2e-6)


def test_texts_equal_those_of_hf(models: tuple[Any, Any]) -> None:
    contexts = [
        ("The quick", {"until": [" "], "max_gen_toks": 12}),
        ("The", {"until": ["\n"], "max_gen_toks": 8}),
        (TEXT, {"max_gen_toks": 5}),
    ]
    ours, theirs = (model.generate_until(asked("generate_until", *contexts), disable_tqdm=True) for model in models)
    assert ours == theirs
    assert any(ours)


@pytest.mark.slow
def test_a_task_of_a_local_file_has_the_same_results(folder: Path, models: tuple[Any, Any], tmp_path: Path) -> None:
    rows = [{"q": f"{word} is", "choices": ["quick", "lazy dog", "x"], "gold": n % 3} for n, word in enumerate(TEXT.split()[:12])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local.yaml").write_text(
        f"""task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    found = []
    for model in models:
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        results = simple_evaluate(model=model, tasks=["local_choice"], task_manager=manager, bootstrap_iters=0)
        found.append({name: value for name, value in results["results"]["local_choice"].items() if name.startswith("acc")})
    assert found[0] == found[1]
    assert {"acc,none", "acc_norm,none"} <= found[0].keys()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.generate_until(asked("generate_until", ("x", {"max_gen_toks": 64}))), "max_gen_toks = 64: the model has 64"),
        (lambda model: model.generate_until(asked("generate_until", ("x", {"num_beams": 2}))), "num_beams=2: is not known"),
    ],
)
def test_what_cannot_be_done_is_refused(models: tuple[Any, Any], call: Callable[[Any], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(models[0])
