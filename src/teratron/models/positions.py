"""Positions: rotary angles and their scalings, waves that are added to embeddings, and rates at which scores fall with the distance.

Shape letters: see `leaves.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from teratron.config import ModelConfig


def rotary(config: ModelConfig, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """cos and sin of each position's angles, [B, 1, S, features / 2] (Su et al. 2021); None = positions are not rotary."""
    if config.position != "rope":
        return None
    cos, sin = _turns(positions_BS, frequencies(config, dtype, positions_BS.device))
    factor = 1.0 if config.latent else config.sharpness  # latent attention sharpens the features that are not rotated, too
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def rotary_in_window(config: ModelConfig, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """The same for layers that attend over a window; None = they have no base of their own."""
    if not config.window_theta:
        return None
    return _turns(positions_BS, _unstretched(config, config.window_theta, dtype, positions_BS.device))


def _turns(positions_BS: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions_BS[:, None, :, None].to(frequencies.dtype) * frequencies
    return angles.cos(), angles.sin()


def frequencies(config: ModelConfig, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Radians a token of each pair of rotated features, [features / 2], stretched as `model.rope_scaling` says."""
    width, base, factor = config.rotary_features, config.rope_theta, config.rope_factor
    if config.rope_scaling == "ntk":
        base = base * factor ** (width / max(width - 2, 1))
    plain = _unstretched(config, base, dtype, device)
    if config.rope_scaling == "linear":
        return plain / factor
    if config.rope_scaling == "llama3":
        return _between(plain / factor, plain, _fast_by_turns(config, plain))
    if config.rope_scaling == "yarn":
        return _between(plain / factor, plain, _fast_by_number(config, plain))
    return plain


def _unstretched(config: ModelConfig, base: float, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    exponents = torch.arange(0, config.rotary_features, 2, dtype=dtype, device=device)
    return 1 / base ** (exponents / config.rotary_features)  # the field's rounding, bit for bit


def _between(slow: Tensor, fast: Tensor, share: Tensor) -> Tensor:
    return slow * (1 - share) + fast * share


def _fast_by_turns(config: ModelConfig, plain: Tensor) -> Tensor:
    """How far each frequency stays as it is, 0 to 1, rising with its turns in the first context (Llama 3.1)."""
    turns = config.rope_original * plain / (2 * math.pi)
    return ((turns - config.rope_slow) / (config.fast_turns - config.rope_slow)).clamp(0, 1)


def _fast_by_number(config: ModelConfig, plain: Tensor) -> Tensor:
    """The same, falling with the frequency's number between those that have so many turns (YaRN, Peng et al. 2024)."""

    def number(turns: float) -> float:
        return config.rotary_features * math.log(config.rope_original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first = max(math.floor(number(config.fast_turns)), 0)
    last = min(math.ceil(number(config.rope_slow)), config.rotary_features - 1)
    numbers = torch.arange(len(plain), dtype=plain.dtype, device=plain.device)
    return 1 - ((numbers - first) / (last - first if last != first else 0.001)).clamp(0, 1)


def rotate(x_BNSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head's first features by the positions' angles, in float32 for half types."""
    turned, rest = x_BNSD.tensor_split([2 * cos.shape[-1]], dim=-1)
    first, second = turned.to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BNSD.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


class Waves(nn.Module):
    """Sines and cosines of the position, in turn, with wavelengths from 2 pi to 20,000 pi (Vaswani et al. 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, index_BS: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, S, width]."""
        exact = torch.promote_types(dtype, torch.float32)
        exponents = torch.arange(0, self.width, 2, dtype=exact, device=index_BS.device) / self.width
        angles = index_BS.unsqueeze(-1).to(exact) / 10000.0**exponents
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., : self.width].to(dtype)


def slopes(heads: int) -> list[float]:
    """How much each head's scores fall a token (ALiBi, Press et al. 2022): powers of 2^(-8 / heads).

    Where heads are no power of two: those of the power below, and every other one of twice as many.
    """
    power = 2 ** (heads.bit_length() - 1)
    found = [2 ** (-8 * (n + 1) / power) for n in range(power)]
    return found + [2 ** (-4 * (n + 1) / power) for n in range(0, 2 * (heads - power), 2)]
