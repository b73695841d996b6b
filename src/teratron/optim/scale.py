"""Loss scaling for float16: gradients too small for the type are kept by a factor on the loss (Micikevicius et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from teratron.config import OptimConfig


@dataclass(frozen=True)
class LossScale:
    """The factor and what decides when it changes; a part of the training state.

    Megatron-LM's rules: `loss_scale_window` clean steps double it. An overflow skips the update; once `loss_scale_hysteresis` of
    them have come since the last doubling, that one and every further one halve it.
    """

    scale: float = 1.0
    clean: int = 0
    """Steps without overflow since the last change."""
    overflows: int = 0
    """Since the scale was last doubled."""

    @staticmethod
    def start(config: OptimConfig, precision: str) -> LossScale:
        """Where a run begins; 1 in every precision but fp16."""
        return LossScale(config.loss_scale or config.initial_loss_scale) if precision == "fp16" else LossScale()

    def after(self, finite: bool, config: OptimConfig, precision: str) -> LossScale:
        """The scale of the next step. finite: whether the gradient norm of this one was."""
        if precision != "fp16" or config.loss_scale:
            return self
        if not finite:
            count = self.overflows + 1
            halved = max(self.scale / 2, config.min_loss_scale) if count >= config.loss_scale_hysteresis else self.scale
            return LossScale(halved, 0, count)
        if self.clean + 1 == config.loss_scale_window:
            return LossScale(self.scale * 2)
        return replace(self, clean=self.clean + 1)
