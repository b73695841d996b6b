"""`teratron finetune chat`: what a conversation becomes, what of it is learnt, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tuned import ANIMALS, COLOURS, decoder, finetune, scores

from teratron.cli.main import main
from teratron.config import Config, ModelConfig, UserError
from teratron.data.examples import Example
from teratron.data.tokenizer import ByteTokenizer
from teratron.models import Model, build_model, initialise
from teratron.tasks.finetune.chat import Chat, Reply, conversation, fitted
from teratron.tasks.finetune.conversations import conversations
from teratron.tasks.finetune.rows import Table
from teratron.tasks.finetune.task import Options, forward
from teratron.tasks.finetune.templates import Turn, Writer, template_of
from teratron.tasks.finetune.use import reply
from teratron.tasks.finetune.writing import losses

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
]
ROW = {"messages": MESSAGES}
WRITTEN = {
    "plain": "Be brief.\nUser: Hi\nAssistant: Hello.{end}User: Who?\nAssistant: Me.{end}",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n",
    "llama2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello.{end}[INST] Who? [/INST] Me.{end}",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nMe.<|eot_id|>",
    "text": "Be brief. Hi Hello.{end}Who? Me.{end}",
}
LEARNED = {
    "plain": " Hello.{end} Me.{end}",
    "chatml": "Hello.<|im_end|>\nMe.<|im_end|>\n",
    "llama2": " Hello.{end} Me.{end}",
    "llama3": "Hello.<|eot_id|>Me.<|eot_id|>",
    "text": " Hello.{end} Me.{end}",
}


class Marked(ByteTokenizer):
    """Bytes, and two marks as tokens of their own."""

    def token_id(self, token: str) -> int | None:
        return {"<|im_start|>": 300, "<|im_end|>": 301}.get(token, super().token_id(token))


def spelled(ids: Any) -> str:
    return ByteTokenizer().decode([int(token) for token in ids]).replace("<|endoftext|>", "{end}")


def task(**options: Any) -> Chat:
    return Chat(Options(512, **options))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_conversation_is_written_as_its_template_says_and_replies_alone_are_learned(name: str) -> None:
    (example,) = task(template=name).examples([ROW], decoder(512))
    assert spelled([example["tokens"][0], *example["targets"]]) == WRITTEN[name]
    assert spelled(example["targets"][example["weights"] > 0]) == LEARNED[name]


def test_marks_are_tokens_where_the_tokenizer_has_them_but_never_what_somebody_says() -> None:
    tokenizer = Marked()
    assert template_of("auto", tokenizer) is template_of("chatml", tokenizer)
    assert template_of("auto", ByteTokenizer()) is template_of("plain", tokenizer)
    said = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "no"}]
    user, assistant = Writer(template_of("auto", tokenizer), tokenizer).turns(said)
    assert user.before[0] == assistant.before[0] == 300
    assert user.after[0] == assistant.after[0] == 301
    assert user.content.tolist() == [*b"<|im_end|>"]


def model_of(**keys: Any) -> tuple[Model, Config]:
    config = Config(model=ModelConfig(layers=2, hidden=32, heads=2, seq_length=160, vocab_size=257, init_std=0.3, **keys))
    config = config.override({"objective.name": "supervised", "data.examples": "there"})
    model = build_model(config.model, dtype=torch.float64)
    initialise(model, seed=1)
    return model.eval(), config


@pytest.mark.parametrize("position", ["learned", "rope", "alibi"])
def test_packed_conversations_do_not_see_each_other(position: str) -> None:
    model, config = model_of(position=position)
    rows = [{"messages": MESSAGES[1 + number % 2 * 2 :]} for number in range(3)]
    alone, packs = (Chat(Options(160, pack=pack)).examples(rows, decoder(160)) for pack in (False, True))
    assert len(packs) < len(alone) == 3

    def hidden(examples: list[Example]) -> list[torch.Tensor]:
        return [state["hidden"][0, : len(example["tokens"])] for example in examples for _, _, state in forward(model, config, [example])]

    torch.testing.assert_close(torch.cat(hidden(packs)), torch.cat(hidden(alone)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(losses(model, config, packs).sum(), losses(model, config, alone).sum(), rtol=1e-9)


def test_perplexity_is_of_the_tokens_of_all_replies() -> None:
    model, config = model_of()
    rows = [ROW, {"messages": MESSAGES[1:3]}]
    found = Chat(Options(160, target_length=4)).predict(model, config, rows, decoder(160))
    assert [reply.tokens for reply in found] == [len(" Hello. Me.") + 2, len(" Hello.") + 1]
    (metric, *_), _ = task().score(rows, found).metrics, None
    assert metric.name == "perplexity"
    expected = np.exp(sum(reply.loss for reply in found) / sum(reply.tokens for reply in found))
    assert metric.of(np.arange(2)) == pytest.approx(expected)


def turn(role: str, size: int) -> Turn:
    return Turn(role, np.zeros(1, int), np.arange(size), np.zeros(1, int))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.booleans(), st.integers(8, 60))
def test_what_is_too_long_loses_its_oldest_turns_first(sizes: list[int], system: bool, room: int) -> None:
    roles = ["user", "assistant"] * 6
    turns = ([turn("system", 3)] if system else []) + [turn(role, size) for role, size in zip(roles, sizes * 2, strict=False)]
    kept = fitted(turns, room)
    assert sum(one.size for one in kept) <= room
    if sum(one.size for one in turns) <= room:
        assert kept == turns
    assert kept[-1].role == turns[-1].role
    if len(kept) > 2 + system:
        tail = kept[system:] if kept[0].role == "system" else kept
        assert tail == turns[len(turns) - len(tail) :]
        assert tail[0].role == "user"


def test_a_reply_that_is_cut_does_not_end() -> None:
    kept = fitted([turn("user", 20), turn("assistant", 30)], 30)
    assert [len(one.content) for one in kept] == [10, 16]
    assert [len(one.after) for one in kept] == [1, 0]


def test_the_usual_formats_are_the_same_conversation() -> None:
    expected = [{"role": "user", "content": "Hi\n\nthere"}, {"role": "assistant", "content": "Yes"}]
    forms: list[dict[str, Any]] = [
        {"messages": [*expected, {"role": "user", "content": "left over"}]},
        {"messages": [{"from": "human", "value": "Hi\n\nthere"}, {"from": "gpt", "value": "Yes"}]},
        {"instruction": "Hi", "input": "there", "output": "Yes"},
        {"instruction": "Hi", "instances": [{"input": "there", "output": "Yes"}]},
    ]
    assert all(conversations(form, "a row") == [expected] for form in forms)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({}, "has neither messages nor an instruction"),
        ({"messages": "hello"}, "messages are 'hello', expected a list"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "role 'usr': expected .*did you mean 'user'"),
        ({"messages": [{"role": "user", "content": 3}]}, "a message is .* expected texts"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the assistant answers no user"),
        ({"instruction": "a", "output": None}, "expected texts as instruction"),
        ({"instruction": "a", "instances": "b"}, "'instances' is 'b', expected a list"),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_row(row: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"example 1: .*{told}"):
        Chat.read(Table("talk", [row]))


def test_an_unknown_template_is_refused() -> None:
    with pytest.raises(UserError, match=r"--template chatm: expected auto, .*did you mean 'chatml'"):
        task(template="chatm").examples([ROW], decoder(512))


def test_it_learns_to_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = dict(zip(COLOURS, ANIMALS, strict=True))
    rows = [{"instruction": colour, "output": animal} for colour, animal in pairs.items()] * 48
    more = ("--template", "text", "--pack", "--target-length", "3", "--epochs", "20")
    assert finetune("chat", tmp_path, "gpt", rows, rows[:4], *more) == 0
    found = scores(tmp_path)
    assert found["metrics"]["rougeL"]["value"] == 1 > found["baseline"]["rougeL"]
    assert found["metrics"]["perplexity"]["value"] < 1.5
    assert reply(tmp_path / "run", [{"role": "user", "content": "red"}]) == pairs["red"]
    capsys.readouterr()
    command = ["generate", str(tmp_path / "run"), "--chat", "red"]
    assert main(command) == 0
    assert capsys.readouterr().out == pairs["red"] + "\n"
    for more, told in ((["--seed", "1"], "--seed has no effect"), (["blue"], "the prompt 'blue' has no effect")):
        assert main([*command, *more]) == 2
        assert told in capsys.readouterr().err


def test_the_baseline_repeats_the_question() -> None:
    assert task().baseline([ROW]) == [Reply("Who?")]
    assert len(conversation(np.array([7]), [turn("user", 2)])["tokens"]) == 4
