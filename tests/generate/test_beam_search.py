"""Beam search finds what trying every continuation finds, what transformers finds, and the same alone as in any batch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from teratron.checkpoint import LoadedModel, open_model
from teratron.config import ModelConfig, UserError
from teratron.data.tokenizer import ByteTokenizer
from teratron.generate import AnswerDecoder, BeamSearch, Choices, Decoder, Request, Sampling, TokenStream, complete, generate
from teratron.generate.beam import beam_search
from teratron.generate.text import Continuation
from teratron.models import EncoderDecoder, Model, build_model, initialise

END, START, VOCAB = 0, 1, 4
TINY = ModelConfig(layers=2, hidden=16, heads=2, seq_length=24, vocab_size=VOCAB, vocab_multiple=1, init_std=0.5)
FAMILIES = {
    "gpt": TINY,
    "encoder_decoder": dataclasses.replace(
        TINY, family="encoder_decoder", position="relative", relative_buckets=4, relative_distance=6, norm="rmsnorm", bias=False
    ),
}
Found = list[list[tuple[tuple[int, ...], float]]]


def made(config: ModelConfig, seed: int = 1) -> Model:
    model = build_model(config, dtype=torch.float64)
    initialise(model, seed)
    return model.eval()


def decoder_of(model: Model, prompts: Sequence[list[int]], new: int) -> Decoder:
    return AnswerDecoder(model, prompts, START, new) if isinstance(model, EncoderDecoder) else Decoder(model, prompts, new)


def searched(model: Model, prompts: Sequence[list[int]], new: int, search: BeamSearch, ends: tuple[int, ...] = (END,)) -> Found:
    begun = [Continuation([], lambda ids: "".join(map(chr, ids))) for _ in prompts]
    found = beam_search(decoder_of(model, prompts, new), search, begun, ends)
    return [[(tuple(one.row.tokens), search.score(one.total, one.length)) for one in several] for several in found]


def log_likelihood(model: Model, prompt: list[int], written: Sequence[int]) -> float:
    """Of all of `written` behind the prompt, by one forward pass."""
    return log_likelihoods(model, prompt, [written])[0]


def log_likelihoods(model: Model, prompt: list[int], several: Sequence[Sequence[int]]) -> list[float]:
    """Those of texts of one length."""
    written = torch.tensor(several)
    head = torch.tensor([[START] if isinstance(model, EncoderDecoder) else prompt] * len(several))
    tokens = torch.cat([head, written[:, :-1]], dim=1)
    state = {"tokens": tokens, "positions": torch.arange(tokens.shape[1]).expand(tokens.shape)}
    if isinstance(model, EncoderDecoder):
        state |= {"encoder_tokens": torch.tensor([prompt] * len(several))}
        state |= {"encoder_positions": torch.arange(len(prompt)).expand(len(several), -1)}
    with torch.no_grad():
        likely = model.head.output(model(state)["hidden"])[:, -written.shape[1] :].log_softmax(-1)
    return likely.gather(-1, written[..., None]).sum((1, 2)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5, -1.0])
def test_enough_beams_find_the_best_of_all_continuations(family: str, penalty: float) -> None:
    model, prompts, depth = made(FAMILIES[family]), [[2, 3], [3, 3, 1]], 3
    goes_on = [token for token in range(VOCAB) if token != END]
    every = [[(*some, END) for some in itertools.product(goes_on, repeat=n)] for n in range(depth)]
    every[-1] += itertools.product(goes_on, repeat=depth)
    for prompt, found in zip(prompts, searched(model, prompts, depth, BeamSearch(VOCAB**depth, penalty)), strict=True):
        likely = {some: total for same in every for some, total in zip(same, log_likelihoods(model, prompt, same), strict=True)}
        scores = {some: total / len(some) ** penalty for some, total in likely.items()}
        best = sorted(scores, key=scores.__getitem__, reverse=True)
        assert [tokens for tokens, _ in found] == [tuple(token for token in some if token != END) for some in best]
        assert [score for _, score in found] == pytest.approx([scores[some] for some in best], rel=1e-10)


def test_one_beam_is_greedy(model: Model) -> None:
    prompts = [[72, 105], [256], [10, 20, 30]]
    stream = TokenStream(Decoder(model, prompts, 12), Sampling(temperature=0))
    rows: list[list[int]] = [[], [], []]
    for row, token in itertools.chain.from_iterable(stream):
        rows[row].append(token)
    found = searched(model, prompts, 12, BeamSearch(1), ends=())
    assert [list(one[0][0]) for one in found] == rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("search", [BeamSearch(4, 0.5), BeamSearch(3, early_stopping=True)], ids=str)
def test_a_prompt_finds_the_same_alone_and_beside_others(family: str, search: BeamSearch) -> None:
    model = made(dataclasses.replace(FAMILIES[family], vocab_size=30), 6 if family == "gpt" else 4)
    prompts = [[2, 3], [4, 4, 1, 7, 20, 9], [5], [11, 12, 13]]
    ends = (END, 2, 17, 28)
    together = searched(model, prompts, 12, search, ends)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = searched(model, [prompt], 12, search, ends)
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in alone]
        assert [score for _, score in found] == pytest.approx([score for _, score in alone], rel=1e-10)
    assert len({len(found[0][0]) for found in together}) > 1, "prompts should end at different steps"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Model]]:
    """A model of transformers in float64, and ours with its weights."""
    transformers = pytest.importorskip("transformers", reason="transformers searches for comparison: pip install transformers")
    gpt2 = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=30, initializer_range=0.4)
    t5 = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=30, decoder_start_token_id=START)
    t5.initializer_factor = 1.5
    found = {}
    for name, kind, config in (
        ("gpt", transformers.GPT2LMHeadModel, gpt2),
        ("encoder_decoder", transformers.T5ForConditionalGeneration, t5),
    ):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(5)
        kind(config).save_pretrained(folder)
        found[name] = kind.from_pretrained(folder).double().eval(), open_model(folder, "cpu", torch.float64).model
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("search", [BeamSearch(4), BeamSearch(3, 0.0), BeamSearch(5, 2.0, True), BeamSearch(2, -0.5)], ids=str)
def test_transformers_finds_the_same(theirs: dict[str, tuple[Any, Model]], family: str, search: BeamSearch) -> None:
    reference, model = theirs[family]
    prompts, ends = [[3, 4, 5, 6], [8], [9, 25, 7]], (END, 2, 17, 21, 28)
    for prompt, found in zip(prompts, searched(model, prompts, 10, search, ends), strict=True):
        settings = {"num_beams": search.beams, "num_return_sequences": search.beams, "length_penalty": search.length_penalty}
        settings |= {"early_stopping": search.early_stopping or "never", "max_new_tokens": 10, "do_sample": False}
        settings |= {"eos_token_id": list(ends), "pad_token_id": END, "return_dict_in_generate": True, "output_scores": True}
        ids = torch.tensor([prompt])
        result = reference.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        rows = result.sequences[:, 1 if family == "encoder_decoder" else len(prompt) :].tolist()
        expected = [tuple(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]
        assert [tokens for tokens, _ in found] == expected
        assert [score for _, score in found] == pytest.approx(result.sequences_scores.tolist(), rel=1e-5, abs=1e-6)  # float32


def test_windows_and_latent_attention_take_beams(make_model: Callable[..., Model]) -> None:
    for keys in ({"window": 3, "global_tokens": 1}, {"latent": 8, "rope_dim": 4, "kv_heads": 4, "qk_norm": False}):
        model = make_model("llama", **keys)
        for prompt, found in zip([[5, 6, 7, 8], [9]], searched(model, [[5, 6, 7, 8], [9]], 8, BeamSearch(3)), strict=True):
            for tokens, score in found:
                written = tokens if len(tokens) == 8 else (*tokens, END)
                assert score == pytest.approx(log_likelihood(model, prompt, written) / len(written), rel=1e-9)


def test_completions_are_the_best_beams_with_their_scores(loaded: LoadedModel) -> None:
    done = list(complete(loaded, ["Hi", "The cat"], Request(BeamSearch(4), 9, samples=3)))
    assert [one.prompt for one in done] == ["Hi"] * 3 + ["The cat"] * 3
    scores = [one.score or 0.0 for one in done]
    assert scores[:3] == sorted(scores[:3], reverse=True)
    assert len({one.text for one in done[:3]}) == 3
    assert all(one.text == ByteTokenizer().decode(one.tokens) and not one.finished for one in done)
    assert generate(loaded, ["Hi", "The cat"], beams=4, max_new_tokens=9, batch=4) == [done[0].text, done[3].text]
    greedy = generate(loaded, "Hi", temperature=0, max_new_tokens=9)
    assert greedy != done[0].text, "a search that changes nothing shows nothing"


def test_a_stop_text_ends_a_beam(loaded: LoadedModel) -> None:
    full = next(complete(loaded, ["Hi"], Request(BeamSearch(3), 9)))
    stop = full.text[2:4]
    assert len(stop) == 2
    for one in complete(loaded, ["Hi"], Request(BeamSearch(3), 9, stop=(stop,), samples=3)):
        assert stop not in one.text
        assert one.finished == (stop in ByteTokenizer().decode(one.tokens))
        assert len(one.tokens) == 9 or one.finished


def test_all_choices_are_ranked_by_their_likelihood(loaded: LoadedModel) -> None:
    texts = ("yes", "no", "perhaps", "y")
    ranked = list(complete(loaded, ["Is it?"], Request(BeamSearch(4, 0.0), 9, samples=4, constraint=Choices(texts))))
    assert {one.text for one in ranked} == set(texts)
    assert all(one.finished for one in ranked)
    prompt = list(b"Is it?")
    for one in ranked:
        written = [*one.tokens, 256] if one.text == "y" else one.tokens  # where a choice may go on, that it ends counts
        assert one.score == pytest.approx(log_likelihood(loaded.model, prompt, written), rel=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": -1}, "beams = -1: expected at least 1"),
        ({"beams": 4, "top_k": 5}, "top_k = 5 with beams = 4, which draws nothing at random: leave one of them out"),
        ({"beams": 4, "contrastive_k": 5}, "beams = 4 with contrastive_k = 5, another way to search: leave one of them out"),
        ({"length_penalty": 2.0}, "length_penalty = 2.0 needs beams"),
        ({"early_stopping": True}, "early_stopping needs beams"),
        ({"beams": 2, "length_penalty": float("inf")}, "length_penalty = inf: expected a number"),
    ],
)
def test_options_that_contradict_are_refused(loaded: LoadedModel, options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(loaded, "Hi", **options)
    with pytest.raises(UserError, match="samples = 5 of beams = 4"):
        Request(BeamSearch(4), samples=5)
