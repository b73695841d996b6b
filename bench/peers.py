"""The contenders: this project's training step, and the same model in a plain PyTorch loop, hand-written or from `transformers`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import nanogpt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import OPTIM, SEED, Workload, is_llama, peer_state

from teratron.config import Config, ModelConfig, UserError
from teratron.data.batch import make_batch
from teratron.data.indexed import IndexedDataset
from teratron.data.samples import NativeSamples
from teratron.models import load_parts, parameter_count
from teratron.parallel.mesh import Mesh
from teratron.train.device import keep_freed_memory
from teratron.train.engine import Engine


class Contender(Protocol):
    """A model in training. A step is everything: making the batch, forward, backward, clipping, AdamW, clearing the gradients."""

    def parameters(self) -> int:
        """Parameters, shared ones once, without padding."""

    def learn(self, rows: np.ndarray) -> float:
        """One step on given token ids int64 [B, S + 1]; returns the loss before it."""

    def step(self) -> None:
        """One step on the next batch that its own sampler draws; on CUDA it may still be running on return."""


class Teratron:
    """This project: its sampler, its batches as the Trainer makes them, its step."""

    def __init__(self, workload: Workload, data: Path, parts: Mapping[str, Tensor], precision: str, device: torch.device) -> None:
        keep_freed_memory()
        self.batch, self.device, self.steps = workload.batch, device, 0
        dataset = IndexedDataset(data)
        self.samples = NativeSamples(dataset, 0, dataset.total_tokens, workload.model.seq_length, SEED)
        keys = {"train.global_batch": workload.batch, "train.precision": precision, "train.seed": SEED}
        self.engine = Engine(Config(model=workload.model, optim=OPTIM).override(keys), Mesh(), device)
        load_parts(self.engine.model, parts)
        for bucket in self.engine.flat.buckets:
            bucket.master.copy_(bucket.shard)

    def parameters(self) -> int:
        return parameter_count(self.engine.model)

    def learn(self, rows: np.ndarray) -> float:
        first = self.steps * self.batch
        self.steps += 1
        batch = make_batch(rows, np.arange(first, first + self.batch), eod=None, isolate_documents=False, mask_end_of_document=False)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        return self.engine.step(batch, step=self.steps, number=self.steps, lr=OPTIM.lr)[0].loss()

    def step(self) -> None:
        self.learn(self.samples.rows(np.arange(self.steps * self.batch, (self.steps + 1) * self.batch)))


class PlainLoop:
    """A plain loop as its users write it: random windows, autocast for bf16, `cross_entropy` on full logits, `torch.optim.AdamW`."""

    def __init__(
        self, model: nn.Module, logits: Callable[[Tensor], Tensor], workload: Workload, data: Path, precision: str, fused: bool | None
    ) -> None:
        self.model, self.logits, self.workload = model, logits, workload
        self.tokens = IndexedDataset(data).tokens
        self.device = next(model.parameters()).device
        self.autocast = torch.autocast(self.device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False))
        groups = [{"params": matrices, "weight_decay": OPTIM.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps, fused=fused)

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def learn(self, rows: np.ndarray) -> float:
        tokens = torch.from_numpy(rows)
        return float(self._learn(tokens[:, :-1].contiguous().to(self.device), tokens[:, 1:].contiguous().to(self.device)))

    def step(self) -> None:
        self._learn(*self._next_batch())

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        length = self.workload.model.seq_length
        starts = torch.randint(len(self.tokens) - length, (self.workload.batch,)).tolist()
        x, y = (
            torch.stack([torch.from_numpy(self.tokens[start + shift : start + shift + length].astype(np.int64)) for start in starts])
            for shift in (0, 1)
        )
        if self.device.type == "cuda":
            return x.pin_memory().to(self.device, non_blocking=True), y.pin_memory().to(self.device, non_blocking=True)
        return x, y

    def _learn(self, x: Tensor, y: Tensor) -> Tensor:
        with self.autocast:
            logits = self.logits(x)
            loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), OPTIM.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def build(name: str, workload: Workload, data: Path, parts: Mapping[str, Tensor], precision: str, device: torch.device) -> Contender:
    """The contender `teratron` or one of `PEERS`, with the weights `parts`.

    Raises `UserError` for an unknown name, and where a peer cannot express the workload (see `check_peer`).
    """
    if name == "teratron":
        return Teratron(workload, data, parts, precision, device)
    check_peer(name, workload)
    family, fused = PEERS[name]
    state = peer_state(workload.model, parts)
    if family == "nanogpt":
        model: Any = (nanogpt.Llama if is_llama(workload.model) else nanogpt.GPT2)(workload.model)
        _load(model, state)
        model.to(device)
        return PlainLoop(model, model, workload, data, precision, fused)
    model = _transformers_model(workload.model)
    if not is_llama(workload.model):  # GPT-2's Conv1D stores its matrices [in, out]
        state = {key: value.t() if value.dim() > 1 and ".h." in key else value for key, value in state.items()}
    _load(model, state)
    model.to(device)
    return PlainLoop(model, lambda x: model(x, use_cache=False).logits, workload, data, precision, fused)


PEERS: dict[str, tuple[str, bool | None]] = {
    "nanogpt": ("nanogpt", None),
    "nanogpt-fused": ("nanogpt", True),
    "transformers": ("transformers", None),
    "transformers-fused": ("transformers", True),
}
"""Each peer's model, and `fused` of its AdamW; None = PyTorch's own choice, which is a loop on CPU and foreach on CUDA."""


def check_peer(name: str, workload: Workload) -> None:
    """Raises `UserError` for a name that is no peer, and for a workload that the peer has no model for."""
    if name not in PEERS:
        raise UserError(f"--peers {name}: expected some of {', '.join(PEERS)}")
    if PEERS[name][0] == "transformers" and not is_llama(workload.model) and not workload.model.bias:
        raise UserError(f"--peers {name}: GPT2LMHeadModel always has biases, workload {workload.name} has none; use --peers nanogpt")


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights in; whatever is not in `state` must be tied to something that is."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if "lm_head.weight" not in state else set()
    if unexpected or set(missing) - tied:
        raise UserError(f"{type(model).__name__}: weights missing {missing}, unexpected {unexpected}: another version of the class?")


def _transformers_model(config: ModelConfig) -> Any:
    import transformers

    shape: dict[str, Any] = {"vocab_size": config.vocab_size, "attn_implementation": "sdpa", "tie_word_embeddings": config.tie_embeddings}
    if is_llama(config):
        shape |= {"hidden_size": config.hidden, "num_hidden_layers": config.layers, "intermediate_size": config.ffn_width}
        shape |= {"num_attention_heads": config.heads, "num_key_value_heads": config.key_value_heads, "rms_norm_eps": config.norm_eps}
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        llama = transformers.LlamaConfig(**shape, max_position_embeddings=config.seq_length, rope_parameters=rope)
        return transformers.LlamaForCausalLM(llama).train()
    shape |= {"n_embd": config.hidden, "n_layer": config.layers, "n_head": config.heads, "n_positions": config.seq_length}
    shape |= {"activation_function": "gelu", "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).train()
