"""`generate`: from the name of a model and prompts to texts, and what its options mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch

from teratron.config import UserError
from teratron.generate.beam import BeamSearch
from teratron.generate.complete import Request, complete
from teratron.generate.contrastive import ContrastiveSearch
from teratron.generate.grammar import JsonSchema, Regex
from teratron.generate.guides import Choices, Constraint
from teratron.generate.sampler import Sampling
from teratron.generate.speculate import Draft, LookUp
from teratron.parallel.device import DTYPES, choose_device
from teratron.parallel.mesh import Mesh

if TYPE_CHECKING:
    from teratron.checkpoint import LoadedModel

PRECISIONS = {name: DTYPES[name] for name in ("fp32", "bf16")}


class Ways(TypedDict, total=False):
    """The options that say how tokens are chosen."""

    temperature: float
    """As of `Sampling`, as are the next three; 0 is greedy."""
    top_k: int
    top_p: float
    seed: int
    contrastive_k: int
    """In place of those, contrastive search: see `ContrastiveSearch.k`; 0 = none."""
    contrastive_alpha: float | None
    """None = 0.6."""
    beams: int
    """In place of those, beam search: see `BeamSearch`, as of the next two; 0 = none."""
    length_penalty: float | None
    """None = 1."""
    early_stopping: bool


def generate(
    source: str | Path | LoadedModel,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int | None = None,
    choices: Sequence[str] = (),
    regex: str | None = None,
    json_schema: str | Mapping[str, Any] | None = None,
    stop: str | Sequence[str] = (),
    lookup: int = 0,
    draft: str | Path | LoadedModel | None = None,
    draft_tokens: int | None = None,
    compile: bool = False,
    batch: int = 16,
    device: str = "auto",
    precision: str | None = None,
    **ways: Unpack[Ways],
) -> str | list[str]:
    """Continue a prompt, or several; returns the new text, or a list of texts in the prompts' order.

    A prompt gets the same text alone and in any batch, up to rounding in the model's matrix products.

    Args:
        source: a run, checkpoint or Hugging Face folder, or an opened model (which stays on its device, in its precision).
        max_new_tokens: None = 100, or fewer where the model's positions end.
        choices, regex, json_schema: the new text is one of these texts, matches this expression, or is JSON of this schema.
        stop: a text, or several, that ends a continuation; it is cut off.
        lookup: tokens guessed at a time from the text itself; 0 = none. The text stays what it is.
        draft, draft_tokens: a small model that guesses instead, of the same tokenizer; None = 4 tokens at a time.
        compile: a step is one compiled program; the first takes a minute to make, and is kept on disk.
        batch: continuations made at the same time, beams counted each.
        device: auto, cpu or cuda. precision: fp32, bf16, or None = as trained, halves in float32.
        ways: how tokens are chosen, see `Ways`.

    Raises `UserError` for what cannot be opened, impossible values, and prompts that do not fit the model's positions.
    """
    how, constraint = chosen_by(ways), constraint_of(choices, regex, json_schema)
    if isinstance(source, (str, Path)):
        loaded = open_source(source, device, precision)
    elif (device, precision) == ("auto", None):
        loaded = source
    else:
        raise UserError(f"device = {device}, precision = {precision}: {source.name} is open already; give both to `open_model`")
    drafter = open_source(draft, device, precision) if isinstance(draft, (str, Path)) else draft
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    ahead = guessed_by(lookup, drafter, draft_tokens)
    request = Request(how, max_new_tokens, stops, batch=batch, constraint=constraint, ahead=ahead, compiled=compile)
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


def chosen_by(ways: Ways) -> Sampling | ContrastiveSearch | BeamSearch:
    """How tokens are chosen by these options. Raises `UserError` for those that contradict each other."""
    contrastive_k, beams = ways.get("contrastive_k", 0), ways.get("beams", 0)
    alpha, penalty, early = ways.get("contrastive_alpha"), ways.get("length_penalty"), ways.get("early_stopping", False)
    if alpha is not None and not contrastive_k:
        raise UserError(f"contrastive_alpha = {alpha} needs contrastive_k: give that, too, such as 4")
    if (penalty is not None or early) and not beams:
        given = "early_stopping" if penalty is None else f"length_penalty = {penalty}"
        raise UserError(f"{given} needs beams: give that, too, such as 4")
    drawn = {name: value for name, value in ways.items() if name in Sampling.__dataclass_fields__}
    if not (contrastive_k or beams):
        return Sampling(**drawn)  # type: ignore[arg-type]
    search = f"contrastive_k = {contrastive_k}" if contrastive_k else f"beams = {beams}"
    for name, value in drawn.items():
        if name != "seed" and value != getattr(Sampling, name):
            raise UserError(f"{name} = {value} with {search}, which draws nothing at random: leave one of them out")
    if contrastive_k and beams:
        raise UserError(f"beams = {beams} with {search}, another way to search: leave one of them out")
    if contrastive_k:
        return ContrastiveSearch(contrastive_k) if alpha is None else ContrastiveSearch(contrastive_k, alpha)
    return BeamSearch(beams, 1.0 if penalty is None else penalty, early)


def guessed_by(lookup: int, draft: LoadedModel | None, draft_tokens: int | None) -> LookUp | Draft | None:
    """Who guesses tokens ahead, by the options of these names. Raises `UserError` for both."""
    if draft is None:
        if draft_tokens is not None:
            raise UserError(f"draft_tokens = {draft_tokens} needs draft: give a small model of the same tokenizer, too")
        return LookUp(lookup) if lookup else None
    if lookup:
        raise UserError(f"lookup = {lookup} and draft {draft.name} are both given: keep one")
    return Draft(draft) if draft_tokens is None else Draft(draft, draft_tokens)


def constraint_of(choices: Sequence[str], regex: str | None, json_schema: str | Mapping[str, Any] | None) -> Constraint | None:
    """What the options of these names leave open; None = everything. Raises `UserError` for several of them."""
    given = [name for name, value in (("choices", choices or None), ("regex", regex), ("json_schema", json_schema)) if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are both given: keep one")
    if choices:
        return Choices(tuple(choices))
    if regex is not None:
        return Regex(regex)
    return None if json_schema is None else JsonSchema(json_schema)
