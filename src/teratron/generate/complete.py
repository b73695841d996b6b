"""Text in, text out: encodes prompts, and gives their continuations as they come or at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from teratron.config import UserError
from teratron.generate.answers import AnswerDecoder
from teratron.generate.beam import BeamSearch, beam_search
from teratron.generate.compiled import CompiledDecoder, check_compiled
from teratron.generate.contrastive import ContrastiveSearch, ContrastiveStream
from teratron.generate.decoder import Decoder, room_for
from teratron.generate.engine import TokenStream
from teratron.generate.frame import frame_of
from teratron.generate.guides import Constraint
from teratron.generate.sampler import Sampling
from teratron.generate.speculate import Draft, Guesser, LookUp, ModelGuesser, SpeculativeStream, TextGuesser
from teratron.generate.text import Continuation
from teratron.models import EncoderDecoder

if TYPE_CHECKING:
    from teratron.checkpoint import LoadedModel
    from teratron.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """A prompt's continuation."""

    prompt: str
    text: str
    """New text, without the prompt and without a stop text."""
    tokens: list[int]
    """New tokens."""
    seed: int
    finished: bool
    """Whether it ended by itself, by a stop text or by its constraint, rather than at `max_new_tokens`."""
    score: float | None = None
    """Beam search's: the mean log-probability of its tokens, or as `BeamSearch.length_penalty` has it."""


@dataclass(frozen=True)
class Request:
    """How prompts are continued."""

    sampling: Sampling | ContrastiveSearch | BeamSearch = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    """New tokens a prompt at most; None = 100, or fewer where the model's positions end."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation; they are cut off."""
    samples: int = 1
    """Continuations of each prompt: number i is sampled with seed + i; of beam search the best ones. Contrastive search has one."""
    batch: int = 16
    """Continuations made at the same time, beams counted each."""
    constraint: Constraint | None = None
    """What every continuation must be."""
    ahead: LookUp | Draft | None = None
    """Who guesses tokens ahead, which changes the speed alone."""
    compiled: bool = False
    """Whether a step is one compiled program: see `CompiledDecoder`."""

    def __post_init__(self) -> None:
        for name in ("samples", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: expected at least 1")
        if isinstance(self.sampling, ContrastiveSearch) and self.samples > 1:
            raise UserError(f"samples = {self.samples}: contrastive search draws nothing, so all would be alike: leave samples out")
        if isinstance(self.sampling, BeamSearch) and self.samples > self.sampling.beams:
            raise UserError(f"samples = {self.samples} of beams = {self.sampling.beams}, which find no more: ask for more beams")
        if self.ahead is not None and not isinstance(self.sampling, Sampling):
            raise UserError("beam and contrastive search look at several tokens anyway: leave lookup and draft out")
        if self.compiled and (self.ahead is not None or not isinstance(self.sampling, Sampling)):
            raise UserError("compiled steps have one token of each row: leave out compile, or lookup, draft, beams and contrastive_k")
        if "" in self.stop:
            raise UserError("stop = '': expected a text of at least one character")

    @property
    def seed(self) -> int:
        """That of each prompt's first continuation."""
        return self.sampling.seed if isinstance(self.sampling, Sampling) else 0


def complete(loaded: LoadedModel, prompts: Sequence[str | Sequence[int]], request: Request) -> Iterator[Completion]:
    """The continuations of all prompts, in their order, batch after batch; those of one prompt side by side.

    A text is read as the model's objective has it (`Frame`); a list of tokens is read as it is. What a prompt is continued with does
    not depend on the batch it is in, up to rounding in the model's matrix products.

    Raises `UserError` for a prompt that cannot be continued before any is.
    """
    generator = Generator(loaded, request)
    encoded = generator.read_all(prompts)
    named = [prompt if isinstance(prompt, str) else generator.frame.tokenizer.decode(prompt) for prompt in prompts]
    return generator.complete(named, encoded)


class Generator:
    """A model with a request, ready for any number of prompts."""

    def __init__(self, loaded: LoadedModel, request: Request) -> None:
        """Raises `UserError` for what the model cannot do."""
        self.loaded, self.request = loaded, request
        self.frame = frame_of(loaded.config.family, loaded.objective, tokenizer_of(loaded))
        how, constraint = request.sampling, request.constraint
        if isinstance(how, ContrastiveSearch) and self.frame.start is not None:
            raise UserError(f"contrastive_k = {how.k}: an encoder-decoder has no contrastive search: leave it out")
        if request.ahead is not None and self.frame.start is not None:
            raise UserError("an encoder-decoder's tokens are not guessed ahead: leave lookup and draft out")
        if request.compiled:
            check_compiled(loaded.model)
        self.draft = request.ahead.loaded if isinstance(request.ahead, Draft) else None
        if self.draft is not None and tokenizer_of(self.draft).fingerprint != self.frame.tokenizer.fingerprint:
            raise UserError(f"draft {self.draft.name}: another tokenizer than {loaded.name} has; use a model of the same one")
        self.vocab = min(self.frame.tokenizer.vocab_size, loaded.config.vocab_size)
        self.guide = None if constraint is None else constraint.guide(self.frame.tokenizer, self.frame.ends, self.vocab)

    def read_all(self, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        """Every prompt's tokens; one that cannot be continued is refused by its number."""
        encoded = []
        for number, prompt in enumerate(prompts, 1):
            try:
                encoded.append(self.frame.read(prompt) if isinstance(prompt, str) else list(prompt))
                room = room_for(encoded[-1], self.loaded.config, self.request.max_new_tokens)
                if self.draft is not None:
                    _fits(encoded[-1], room, self.draft)
            except UserError as error:
                where = f"prompt {number} of {len(prompts)}: " if len(prompts) > 1 else ""
                raise UserError(f"{where}{error}") from None
        return encoded

    def complete(self, named: Sequence[str], encoded: Sequence[list[int]]) -> Iterator[Completion]:
        """The completions of prompts by their texts and what is read of them."""
        request = self.request
        if isinstance(request.sampling, BeamSearch):
            at_once = max(1, request.batch // request.sampling.beams)
            slices = (slice(start, start + at_once) for start in range(0, len(named), at_once))
            return (done for some in slices for done in self._search(request.sampling, named[some], encoded[some]))
        jobs = ((*pair, request.seed + copy) for pair in zip(named, encoded, strict=True) for copy in range(request.samples))
        batches = iter(lambda: list(itertools.islice(jobs, request.batch)), [])
        return (done for batch in batches for done in self._batch(batch))

    def stream(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> TextStream:
        """The text of one batch as it comes. Beam search knows none before its end."""
        request, decoder = self.request, self._decoder(prompts)
        how, ends = request.sampling, self.frame.ends
        if isinstance(how, BeamSearch):
            raise ValueError("beam search knows no text before its end")
        guides = None if self.guide is None else [self.guide] * len(prompts)
        if isinstance(how, ContrastiveSearch):
            return TextStream(ContrastiveStream(decoder, how, ends, guides), self._begun(prompts))
        if request.ahead is None:
            return TextStream(TokenStream(decoder, how, ends, seeds, guides), self._begun(prompts))
        guesser, most = self._guesser(decoder, how, seeds), request.ahead.tokens
        return TextStream(SpeculativeStream(decoder, guesser, most, how, ends, seeds, guides), self._begun(prompts))

    def _guesser(self, decoder: Decoder, how: Sampling, seeds: Sequence[int]) -> Guesser:
        if self.draft is None:
            return TextGuesser(len(decoder.prompts))
        both_sides = frame_of(self.draft.config.family, self.draft.objective, self.frame.tokenizer).both_sides
        drafter = Decoder(self.draft.model, decoder.prompts, 1, self.vocab, both_sides, rewinds=True)
        return ModelGuesser(drafter, decoder.limits, how, seeds)

    def _batch(self, jobs: Sequence[tuple[str, list[int], int]]) -> Iterator[Completion]:
        stream = self.stream([ids for _, ids, _ in jobs], [seed for _, _, seed in jobs])
        for _ in stream:
            pass
        for number, (prompt, _, seed) in enumerate(jobs):
            row = stream.rows[number]
            yield Completion(prompt, row.text, row.tokens, seed, number in stream.tokens.finished)

    def _search(self, how: BeamSearch, named: Sequence[str], encoded: Sequence[list[int]]) -> Iterator[Completion]:
        guides = None if self.guide is None else [self.guide] * len(encoded)
        found = beam_search(self._decoder(encoded), how, self._begun(encoded), self.frame.ends, guides)
        for prompt, hypotheses in zip(named, found, strict=True):
            for one in hypotheses[: self.request.samples]:
                score = how.score(one.total, one.length)
                yield Completion(prompt, one.row.text, one.row.tokens, self.request.seed, one.finished, score)

    def _decoder(self, prompts: Sequence[Sequence[int]]) -> Decoder:
        model, frame, limit = self.loaded.model, self.frame, self.request.max_new_tokens
        if isinstance(model, EncoderDecoder) and frame.start is not None:
            return AnswerDecoder(model, prompts, frame.start, limit, self.vocab)
        if self.request.compiled:
            return CompiledDecoder(model, prompts, limit, self.vocab, frame.both_sides)
        return Decoder(model, prompts, limit, self.vocab, frame.both_sides, rewinds=self.request.ahead is not None)

    def _begun(self, prompts: Sequence[list[int]]) -> list[Continuation]:
        """A text goes on from its prompt, an answer begins anew."""
        heads = [[]] * len(prompts) if self.frame.after else prompts
        return [Continuation(head, self.frame.tokenizer.decode, self.request.stop) for head in heads]


class TextStream:
    """Iterates over steps of one batch; each gives (row, new text), the text perhaps empty.

    `rows` holds what each row has become, complete once the iteration has ended.
    """

    def __init__(self, tokens: TokenStream, rows: list[Continuation]) -> None:
        self.tokens, self.rows = tokens, rows

    def __iter__(self) -> Iterator[list[tuple[int, str]]]:
        for step in self.tokens:
            pieces = []
            for row, token in step:
                if self.rows[row].stopped:  # within a step of several tokens
                    continue
                pieces.append((row, self.rows[row].push(token)))
                if self.rows[row].stopped:
                    self.tokens.stop(row)
            yield pieces
        yield [(index, row.finish()) for index, row in enumerate(self.rows)]


def _fits(prompt: Sequence[int], new: int, draft: LoadedModel) -> None:
    """Raises `UserError` where a draft model has no positions for what the large one writes."""
    try:
        room_for(prompt, draft.config, new)
    except UserError as error:
        raise UserError(f"draft {draft.name}: {error}") from None


def tokenizer_of(loaded: LoadedModel) -> Tokenizer:
    """The model's tokenizer; raises `UserError` without one."""
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.name}: no tokenizer there to read the prompt with; give one with --tokenizer FILE")
    return loaded.tokenizer
