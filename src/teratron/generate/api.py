"""`generate`: from the name of a model and prompts to texts, and what its options mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from teratron.config import UserError
from teratron.generate.beam import BeamSearch
from teratron.generate.complete import Request, complete
from teratron.generate.contrastive import ContrastiveSearch
from teratron.generate.grammar import JsonSchema, Regex
from teratron.generate.guides import Choices, Constraint
from teratron.generate.sampler import Sampling
from teratron.parallel.device import DTYPES, choose_device
from teratron.parallel.mesh import Mesh

if TYPE_CHECKING:
    from teratron.checkpoint import LoadedModel

PRECISIONS = {name: DTYPES[name] for name in ("fp32", "bf16")}


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
    beams: int = 0,
    length_penalty: float | None = None,
    early_stopping: bool = False,
    choices: Sequence[str] = (),
    regex: str | None = None,
    json_schema: str | Mapping[str, Any] | None = None,
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
        beams, length_penalty, early_stopping: in place of those, beam search: see `BeamSearch`; None = 1.
        choices, regex, json_schema: the new text is one of these texts, matches this expression, or is JSON of this schema.
        stop: a text, or several, that ends a continuation; it is cut off.
        batch: continuations made at the same time, beams counted each.
        device: auto, cpu or cuda. precision: fp32, bf16, or None = as trained, halves in float32.

    Raises `UserError` for what cannot be opened, impossible values, and prompts that do not fit the model's positions.
    """
    how = chosen_by(temperature, top_k, top_p, seed, contrastive_k, contrastive_alpha, beams, length_penalty, early_stopping)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    request = Request(how, max_new_tokens, stops, batch=batch, constraint=constraint_of(choices, regex, json_schema))
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


def chosen_by(
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    contrastive_k: int = 0,
    contrastive_alpha: float | None = None,
    beams: int = 0,
    length_penalty: float | None = None,
    early_stopping: bool = False,
) -> Sampling | ContrastiveSearch | BeamSearch:
    """How tokens are chosen by the options of these names. Raises `UserError` for those that contradict each other."""
    if contrastive_alpha is not None and not contrastive_k:
        raise UserError(f"contrastive_alpha = {contrastive_alpha} needs contrastive_k: give that, too, such as 4")
    if (length_penalty is not None or early_stopping) and not beams:
        given = "early_stopping" if length_penalty is None else f"length_penalty = {length_penalty}"
        raise UserError(f"{given} needs beams: give that, too, such as 4")
    search = {"contrastive_k": contrastive_k, "beams": beams}
    name, value = next(((name, value) for name, value in search.items() if value), ("", 0))
    if not name:
        return Sampling(temperature, top_k, top_p, seed)
    other = beams if name != "beams" else 0
    for key, found, default in (("temperature", temperature, 1.0), ("top_k", top_k, 0), ("top_p", top_p, 1.0), ("beams", other, 0)):
        if found != default:
            draws = "which draws nothing at random" if key != "beams" else "another way to search"
            raise UserError(f"{key} = {found} with {name} = {value}, {draws}: leave one of them out")
    if name == "contrastive_k":
        return ContrastiveSearch(contrastive_k) if contrastive_alpha is None else ContrastiveSearch(contrastive_k, contrastive_alpha)
    return BeamSearch(beams, 1.0 if length_penalty is None else length_penalty, early_stopping)


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
