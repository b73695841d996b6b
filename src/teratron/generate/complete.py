"""Text in, text out: opens a model, encodes prompts, and gives their continuations as they come or at once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from teratron.config import UserError
from teratron.generate.answers import AnswerStream, frame_tokens
from teratron.generate.contrastive import ContrastiveSearch, ContrastiveStream, chosen_by
from teratron.generate.engine import TokenStream, room_for
from teratron.generate.sampler import Sampling
from teratron.generate.text import Continuation
from teratron.models import GPT, EncoderDecoder
from teratron.parallel.device import DTYPES, choose_device
from teratron.parallel.mesh import Mesh

if TYPE_CHECKING:
    from teratron.checkpoint import LoadedModel
    from teratron.data.tokenizer import Tokenizer

PRECISIONS = {name: DTYPES[name] for name in ("fp32", "bf16")}


@dataclass(frozen=True)
class Completion:
    """A prompt's continuation."""

    prompt: str
    text: str
    """New text, without the prompt and without a stop text."""
    tokens: list[int]
    """New tokens."""
    seed: int


@dataclass(frozen=True)
class Request:
    """How prompts are continued."""

    sampling: Sampling | ContrastiveSearch = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    """New tokens a prompt at most; None = 100, or fewer where the model's positions end."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation; they are cut off."""
    samples: int = 1
    """Continuations of each prompt; number i is sampled with seed + i. Contrastive search has one."""
    batch: int = 16
    """Continuations made at the same time."""

    def __post_init__(self) -> None:
        for name in ("samples", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: expected at least 1")
        if isinstance(self.sampling, ContrastiveSearch) and self.samples > 1:
            raise UserError(f"samples = {self.samples}: contrastive search draws nothing, so all would be alike: leave samples out")
        if "" in self.stop:
            raise UserError("stop = '': expected a text of at least one character")

    @property
    def seed(self) -> int:
        """That of each prompt's first continuation."""
        return self.sampling.seed if isinstance(self.sampling, Sampling) else 0


def generate(
    source: str | Path | LoadedModel,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    contrastive_k: int = 0,
    contrastive_alpha: float | None = None,
    stop: str | Sequence[str] = (),
    batch: int = 16,
    device: str = "auto",
    precision: str | None = None,
) -> str | list[str]:
    """Continue a prompt, or several; returns the new text, or a list of texts in the prompts' order.

    A prompt gets the same text alone and in any batch, up to rounding in the model's matrix products.

    Args:
        source: a run, checkpoint or Hugging Face folder, or an opened model (which stays on its device, in its precision).
        max_new_tokens: None = 100, or fewer where the model's positions end.
        temperature, top_k, top_p, seed: see `Sampling`; temperature 0 is greedy.
        contrastive_k, contrastive_alpha: in place of those, contrastive search: see `ContrastiveSearch`; None = 0.6.
        stop: a text, or several, that ends a continuation; it is cut off.
        batch: prompts continued at the same time.
        device: auto, cpu or cuda. precision: fp32, bf16, or None = as trained, halves in float32.

    Raises `UserError` for what cannot be opened, impossible values, and prompts that do not fit the model's positions.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    sampling = chosen_by(temperature, top_k, top_p, seed, contrastive_k, contrastive_alpha)
    request = Request(sampling, max_new_tokens, stops, batch=batch)
    if isinstance(source, (str, Path)):
        loaded = open_source(source, device, precision)
    elif (device, precision) == ("auto", None):
        loaded = source
    else:
        raise UserError(f"device = {device}, precision = {precision}: {source.name} is open already; give both to `open_model`")
    several = [prompts] if isinstance(prompts, str) else list(prompts)
    texts = [completion.text for completion in complete(loaded, several, request)]
    return texts[0] if isinstance(prompts, str) else texts


def open_source(
    source: str | Path,
    device: str | torch.device = "auto",
    precision: str | None = None,
    tokenizer: str | None = None,
    mesh: Mesh | None = None,
) -> LoadedModel:
    """Open a model for generation: device auto, cpu, cuda or a torch device; precision fp32 or bf16; `tokenizer` replaces its own.

    mesh: cut it over the tensor ranks, which then all generate the same text.
    """
    from teratron.checkpoint import open_model

    if precision is not None and precision not in PRECISIONS:
        raise UserError(f"precision = {precision}: expected {' or '.join(PRECISIONS)}")
    place = choose_device(device) if isinstance(device, str) else device
    loaded = open_model(source, place, PRECISIONS[precision] if precision else None, mesh)
    if tokenizer is None:
        return loaded
    from teratron.data.tokenizer import load_tokenizer

    return dataclasses.replace(loaded, tokenizer=load_tokenizer(tokenizer))


def complete(loaded: LoadedModel, prompts: Sequence[str], request: Request) -> Iterator[Completion]:
    """The continuations of all prompts, batch after batch; those of one prompt side by side, with rising seeds.

    Raises `UserError` for a prompt that cannot be continued before any is.
    """
    encoded = list(zip(prompts, _encode_all(loaded, prompts, request), strict=True))
    jobs = ((prompt, ids, request.seed + copy) for prompt, ids in encoded for copy in range(request.samples))
    batches = iter(lambda: list(itertools.islice(jobs, request.batch)), [])
    return (done for batch in batches for done in _batch(loaded, batch, request))


def _batch(loaded: LoadedModel, jobs: Sequence[tuple[str, list[int], int]], request: Request) -> Iterator[Completion]:
    stream = TextStream(loaded, [ids for _, ids, _ in jobs], request, [seed for _, _, seed in jobs])
    for _ in stream:
        pass
    for (prompt, _, seed), row in zip(jobs, stream.rows, strict=True):
        yield Completion(prompt, row.text, row.tokens, seed)


class TextStream:
    """Iterates over steps of one batch of encoded prompts; each gives (row, new text), the text perhaps empty.

    `rows` holds what each row has become, complete once the iteration has ended.
    """

    def __init__(self, loaded: LoadedModel, prompts: Sequence[list[int]], request: Request, seeds: Sequence[int]) -> None:
        self.tokens = _token_stream(loaded, prompts, request, seeds)
        begun = [[]] * len(prompts) if isinstance(loaded.model, EncoderDecoder) else prompts
        self.rows = [Continuation(prompt, tokenizer_of(loaded).decode, request.stop) for prompt in begun]

    def __iter__(self) -> Iterator[list[tuple[int, str]]]:
        for step in self.tokens:
            pieces = []
            for row, token in step:
                pieces.append((row, self.rows[row].push(token)))
                if self.rows[row].stopped:
                    self.tokens.stop(row)
            yield pieces
        yield [(index, row.finish()) for index, row in enumerate(self.rows)]


def _token_stream(loaded: LoadedModel, prompts: Sequence[list[int]], request: Request, seeds: Sequence[int]) -> TokenStream:
    tokenizer = tokenizer_of(loaded)
    # A new document begins with bos where there is one: the text before it has ended, as with eod.
    ends = {token for token in (tokenizer.eod, tokenizer.bos) if token is not None}
    model, limit, vocab, how = loaded.model, request.max_new_tokens, tokenizer.vocab_size, request.sampling
    if isinstance(model, GPT):
        if isinstance(how, Sampling):
            return TokenStream(model, prompts, how, limit, ends, seeds, vocab)
        return ContrastiveStream(model, prompts, how, limit, ends, vocab)
    if not isinstance(how, Sampling):
        raise UserError(f"contrastive_k = {how.k}: an encoder-decoder has no contrastive search: leave it out")
    start, end = frame_tokens(tokenizer)
    return AnswerStream(model, [[*prompt, end] for prompt in prompts], how, start, limit, ends | {end}, seeds, vocab)


def _encode_all(loaded: LoadedModel, prompts: Sequence[str], request: Request) -> list[list[int]]:
    """Every prompt's tokens; one that cannot be continued is refused by its number."""
    tokenizer = tokenizer_of(loaded)
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        try:
            encoded.append(encode(tokenizer, prompt))
            room_for(encoded[-1], loaded.config, request.max_new_tokens)
        except UserError as error:
            where = f"prompt {number} of {len(prompts)}: " if len(prompts) > 1 else ""
            raise UserError(f"{where}{error}") from None
    return encoded


def tokenizer_of(loaded: LoadedModel) -> Tokenizer:
    """The model's tokenizer; raises `UserError` without one."""
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.name}: no tokenizer there to read the prompt with; give one with --tokenizer FILE")
    return loaded.tokenizer


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's tokens behind bos, if the tokenizer has one; an empty prompt is the start of a document: bos, else eod."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt's character {error.start} is half of one (a lone surrogate): give valid Unicode text") from None
    ids = ([] if tokenizer.bos is None else [tokenizer.bos]) + tokenizer.encode(prompt)
    if ids:
        return ids
    if tokenizer.eod is None:
        raise UserError("the prompt is empty, and the tokenizer has no token for the start or end of a document: give some text")
    return [tokenizer.eod]
