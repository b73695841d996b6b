"""Which objective learns which family of models, and what it asks of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teratron.config.errors import UserError

if TYPE_CHECKING:
    from teratron.config.config import Config

FITS = {
    "next_token": ("gpt", "xlnet"),
    "masked": ("encoder",),
    "permuted": ("xlnet",),
    "span_corruption": ("encoder_decoder", "gpt"),
    "denoising": ("encoder_decoder",),
    "prefix": ("gpt",),
    "ul2": ("encoder_decoder", "gpt"),
    "supervised": ("encoder_decoder", "gpt"),
    "classes": ("encoder", "gpt", "encoder_decoder", "xlnet"),
    "pooled": ("encoder", "xlnet"),
    "pointing": ("encoder", "gpt", "xlnet"),
    "similar": ("encoder", "gpt", "xlnet"),
    "preferred": ("gpt",),
}
"""The families that each objective fits."""
HEADS = {"classes": "classes", "pooled": "classes", "pointing": "classes", "similar": "none"}
"""What model.head must be; `language` for all others."""
FROM_EXAMPLES = ("supervised", "classes", "pooled", "pointing", "similar", "preferred")
WHOLE = ("pooled", "pointing", "similar", "preferred")
"""Those that compare tokens all over an example."""


def check_fit(config: Config) -> None:
    """Raise `UserError` for an objective that does not learn this family of models, or with these keys."""
    objective, family = config.objective.name, config.model.family
    if family not in FITS[objective]:
        others = [name for name, families in FITS.items() if family in families]
        instead = f", or objective.name {' or '.join(others)}" if others else ""
        choose = f"choose model.family {' or '.join(FITS[objective])}{instead}"
        raise UserError(f"objective.name = {objective} does not fit model.family = {family}: {choose}")
    _check_examples(config)
    _check_positions(config)
    if objective != "next_token":
        _check_other_sides(config)
    if objective == "masked":
        _check_masked(config)
    if objective in ("span_corruption", "denoising", "prefix", "ul2"):
        _check_rewriting(config)
    _check_stretches(config)


def _check_examples(config: Config) -> None:
    """What belongs to fine-tuning, and the head that the objective learns."""
    objective, head = config.objective.name, config.model.head
    if (objective in FROM_EXAMPLES) != bool(config.data.examples):
        reads = "reads data.examples" if objective in FROM_EXAMPLES else "reads text, not data.examples"
        raise UserError(f"objective.name = {objective} {reads}: use `teratron finetune`, which sets both, or choose another objective.name")
    if head != HEADS.get(objective, "language"):
        expected = HEADS.get(objective, "language")
        raise UserError(f"model.head = {head} does not fit objective.name = {objective}: set --model.head {expected}")
    if objective == "pointing" and config.model.classes > 2:
        raise UserError(
            f"model.classes = {config.model.classes}: objective.name = pointing has 1 (choices) or 2 (where answers begin, end)"
        )
    if objective in WHOLE and config.parallel.context > 1:
        raise UserError(
            f"parallel.context = {config.parallel.context} cuts sequences, which objective.name = {objective} compares as a whole: use "
            "--parallel.tensor with --parallel.sequence, or --parallel.shard"
        )


def _check_positions(config: Config) -> None:
    """An example may be longer than a model's context where it is several sequences, such as the choices of a question."""
    model = config.model
    if model.seq_length > model.positions and not config.data.examples:
        raise UserError(
            f"model.seq_length = {model.seq_length} exceeds model.max_positions = {model.max_positions}: "
            "lower the first or raise the second"
        )


def _check_other_sides(config: Config) -> None:
    """What goes with next-token prediction alone."""
    name = config.objective.name
    if config.objective.contrastive:
        raise UserError(
            f"objective.contrastive = {config.objective.contrastive} goes with objective.name = next_token, not {name}: leave it out"
        )
    if config.data.mask_end_of_document:
        raise UserError(f"data.mask_end_of_document concerns objective.name = next_token; {name} never predicts that token: leave it out")


def _check_stretches(config: Config) -> None:
    """Where ranks share sequences, no stretch, nor what is predicted of it, may need padding."""
    stretch, ranks, permuted = config.model.recurrence, config.parallel.tensor, config.objective.name == "permuted"
    predicted = config.objective.most_predicted(stretch) if permuted else 0
    if stretch and config.parallel.sequence and (stretch % ranks or predicted % ranks):
        more = f", or the {predicted} tokens of each that are predicted" if permuted else ""
        keys = "model.recurrence and objective.mask_rate" if permuted else "model.recurrence"
        raise UserError(
            f"parallel.sequence with parallel.tensor = {ranks} does not divide stretches of model.recurrence = {stretch} tokens{more}: "
            f"choose {keys} that give multiples of {ranks}, or leave parallel.sequence out"
        )


def _check_masked(config: Config) -> None:
    sentence, model, data = config.objective.sentence, config.model, config.data
    if (sentence != "none") != model.pooler:
        raise UserError(
            f"objective.sentence = {sentence} does not fit model.pooler = {str(model.pooler).lower()}: "
            "with a sentence objective set --model.pooler, without one leave both out"
        )
    if sentence != "none" and model.token_types == 1:
        raise UserError(f"objective.sentence = {sentence} has two kinds of segments, model.token_types is 1: choose 2, or 0 for none")
    if model.seq_length < 8:
        raise UserError(f"model.seq_length = {model.seq_length} is too short for objective.name = masked: choose at least 8")
    if data.isolate_documents and sentence != "none":
        raise UserError(
            f"data.isolate_documents with objective.sentence = {sentence}, whose samples are of one document anyway: leave the first out"
        )


def _check_rewriting(config: Config) -> None:
    if config.data.isolate_documents:
        name = config.objective.name
        raise UserError(
            f"data.isolate_documents concerns objective.name = next_token and masked; {name} rewrites a whole row: leave it out"
        )
