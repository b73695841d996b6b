"""What must hold of positions, attention and the order of layers in a block, beyond each key's own bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teratron.config.errors import UserError

if TYPE_CHECKING:
    from teratron.config.model import ModelConfig


def check_variants(model: ModelConfig) -> None:
    """Raise `UserError` for variants of a model that do not fit each other."""
    _check_rotary(model)
    _check_scaling(model)
    _check_latent(model)
    if model.position == "alibi" and model.family != "gpt":
        raise UserError(
            f"model.position = alibi looks back only, model.family = {model.family} does not: choose learned, sinusoidal or rope"
        )
    if model.norm_place == "sandwich" and model.family == "xlnet":
        raise UserError("model.norm_place = sandwich does not fit model.family = xlnet: choose pre or post")
    if model.block != "sequential" and (model.norm_place != "pre" or model.family not in ("gpt", "encoder")):
        name = "norm_place" if model.norm_place != "pre" else "family"
        raise UserError(
            f"model.block = {model.block} does not fit model.{name} = {getattr(model, name)}: choose model.block sequential, or "
            f"model.{name} {'pre' if name == 'norm_place' else 'gpt'}"
        )
    if model.qkv_bias and (model.latent or model.family in ("xlnet", "encoder_decoder")):
        name = "latent" if model.latent else "family"
        raise UserError(f"model.qkv_bias = true does not fit model.{name} = {getattr(model, name)}: set --model.bias true, or leave it out")
    if model.output_cap and model.family != "gpt":
        raise UserError(f"model.output_cap = {model.output_cap} is for model.family = gpt, not {model.family}: leave it out")


def _check_rotary(model: ModelConfig) -> None:
    if model.window_theta and (model.position != "rope" or not model.window or model.latent):
        raise UserError(
            f"model.window_theta = {model.window_theta} concerns rotary positions in layers with a window, found model.position = "
            f"{model.position}, model.window = {model.window}, model.latent = {model.latent}: leave it out"
        )
    if model.position != "rope":
        if model.rope_share != 1 or model.rope_scaling != "none":
            name = "rope_share" if model.rope_share != 1 else "rope_scaling"
            raise UserError(
                f"model.{name} = {getattr(model, name)} concerns rotary positions, model.position is {model.position}: set "
                "--model.position rope, or leave it out"
            )
        return
    if not model.latent and model.rope_share == 1 and model.head_features % 2:
        raise UserError(f"model.head_dim = {model.head_features} is odd: rotary positions need an even number of features a head")
    if not model.latent and (model.rotary_features % 2 or not 0 < model.rotary_features <= model.head_features):
        raise UserError(
            f"model.rope_share = {model.rope_share} rotates {model.rotary_features} of a head's {model.head_features} features: "
            "choose a share that makes an even number"
        )


def _check_scaling(model: ModelConfig) -> None:
    kind = model.rope_scaling
    if kind == "none":
        wanted = [name for name in ("rope_original", "rope_fast", "rope_sharpness") if getattr(model, name)]
        wanted += ["rope_factor"] if model.rope_factor != 1 else []
        if wanted:
            raise UserError(
                f"model.{wanted[0]} = {getattr(model, wanted[0])} concerns model.rope_scaling, which is none: choose linear, ntk, yarn or "
                "llama3, or leave it out"
            )
        return
    if kind in ("yarn", "llama3") and not model.rope_original:
        raise UserError(f"model.rope_scaling = {kind} needs model.rope_original, the tokens of the context before it was stretched: set it")
    if kind in ("linear", "ntk") and model.rope_original:
        raise UserError(f"model.rope_original = {model.rope_original} concerns yarn and llama3, model.rope_scaling is {kind}: leave it out")
    if kind != "yarn" and model.rope_sharpness:
        raise UserError(f"model.rope_sharpness = {model.rope_sharpness} concerns yarn, model.rope_scaling is {kind}: leave it out")
    if model.rope_fast and model.rope_fast <= model.rope_slow:
        raise UserError(f"model.rope_fast = {model.rope_fast} is not above model.rope_slow = {model.rope_slow}: raise the first")


def _check_latent(model: ModelConfig) -> None:
    if not model.latent:
        wanted = [name for name in ("latent_query", "rope_dim", "value_dim") if getattr(model, name)]
        if wanted:
            raise UserError(f"model.{wanted[0]} = {getattr(model, wanted[0])} concerns model.latent, which is 0: set it, or leave this out")
        return
    if model.position != "rope" or not model.rope_dim or model.rope_dim % 2:
        raise UserError(
            f"model.latent = {model.latent} needs rotated features beside the others: set --model.position rope and an even "
            f"--model.rope_dim, such as 64 (found {model.position}, {model.rope_dim})"
        )
    for name, usual in {"qk_norm": False, "rope_share": 1.0, "mup_base": 0, "kv_heads": 0}.items():
        found = getattr(model, name)
        if found != usual and not (name == "kv_heads" and found == model.heads):
            raise UserError(f"model.{name} = {found} does not fit model.latent = {model.latent}: leave one of them out")
    if model.value_features > model.head_features + model.rope_dim:
        raise UserError(f"model.value_dim = {model.value_dim} exceeds model.head_dim + model.rope_dim: lower it")
    if model.family == "encoder_decoder":
        raise UserError(f"model.latent = {model.latent} does not fit model.family = encoder_decoder: choose gpt, or leave it out")
