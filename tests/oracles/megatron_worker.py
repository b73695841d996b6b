"""Runs megatron-core's GPTModel on CPU in float64: `python megatron_worker.py FOLDER`, with megatron-core on PYTHONPATH.

FOLDER/cases.json maps a case to its model (fields of ModelConfig), tensor (degree), sequence (parallel or not) and inputs, a
safetensors file of our parts and of `batch.tokens`, `batch.positions`, `batch.targets`, `batch.weights`. Each case's logits, loss
and gradients (`gradient.PART`, put together from all ranks) become FOLDER/CASE.safetensors.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from teratron.config import ModelConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a page of them: no Apex, no Transformer Engine
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

DTYPE = torch.float64
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "swiglu": F.silu, "geglu": F.gelu}
Parts = dict[str, Tensor]


def main() -> None:
    folder = Path(sys.argv[1])
    cases = json.loads((folder / "cases.json").read_text("utf-8"))
    patch()
    # Forked, so that megatron-core is imported once; it is the import that takes the time.
    world = max(case["tensor"] for case in cases.values())
    torch.multiprocessing.start_processes(run_rank, (world, folder, cases), nprocs=world, start_method="fork")


def patch() -> None:
    """What keeps megatron-core's own layers from running on CPU, in float64, and with sequence parallelism without Apex."""
    torch.cuda.current_device = lambda: "cpu"
    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    # The original casts to float32, whatever comes.
    VocabParallelCrossEntropy.calculate_logits_max = staticmethod(lambda logits: (logits, logits.max(dim=-1)[0]))
    WrappedTorchNorm.__new__ = new_norm


def new_norm(cls: type, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> nn.Module:
    """torch's norm, marked for sequence parallelism as megatron-core marks Apex's; the original refuses it, unmarked."""
    kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    norm = kind(hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


def run_rank(rank: int, world: int, folder: Path, cases: dict[str, Any]) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(seconds=60), world, rank)
    for name, case in cases.items():
        # A degree below the world's leaves data-parallel replicas that all compute the same.
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=case["tensor"])
        found = run(ModelConfig(**case["model"]), case["sequence"], load_file(folder / case["inputs"]))
        parallel_state.destroy_model_parallel()
        if rank == 0:
            save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / f"{name}.safetensors")
    dist.destroy_process_group()


def run(config: ModelConfig, sequence: bool, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, loss and gradients of one case."""
    parts = {name: tensor.requires_grad_() for name, tensor in inputs.items() if not name.startswith("batch.")}
    tokens, positions, targets, weights = (inputs[f"batch.{name}"] for name in ("tokens", "positions", "targets", "weights"))
    model = build(config, sequence)
    pieces = cut(config, parts)
    load(model, pieces)
    unseen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    logits = model(tokens, positions, unseen, runtime_gather_output=True).detach()
    losses = model(tokens, positions, unseen, labels=targets)
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    return {"logits": logits, "loss": loss.detach()} | {f"gradient.{name}": g for name, g in gradients(model, pieces, parts).items()}


def build(config: ModelConfig, sequence: bool) -> GPTModel:
    """This rank's part of the model, uninitialised."""
    settings = TransformerConfig(
        num_layers=config.layers, hidden_size=config.hidden, ffn_hidden_size=config.ffn_width,
        num_attention_heads=config.heads, num_query_groups=config.key_value_heads, kv_channels=config.head_features,
        normalization="RMSNorm" if config.norm == "rmsnorm" else "LayerNorm", layernorm_epsilon=config.norm_eps,
        activation_func=ACTIVATIONS[config.activation], gated_linear_unit=config.gated, add_bias_linear=config.bias,
        qk_layernorm=config.qk_norm, hidden_dropout=0.0, attention_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(), sequence_parallel=sequence,
        params_dtype=DTYPE, use_cpu_initialization=True, perform_initialization=False, masked_softmax_fusion=False,
    )  # fmt: skip
    spec = gpt_layer_specs.get_gpt_layer_local_spec(qk_layernorm=config.qk_norm, normalization=settings.normalization)
    rope = config.position == "rope"
    model = GPTModel(
        settings, spec, config.vocab_size, config.positions, share_embeddings_and_output_weights=config.tie_embeddings,
        position_embedding_type="rope" if rope else "learned_absolute",
    )  # fmt: skip
    if rope:  # made in float32
        exponents = torch.arange(0, config.head_features, 2, dtype=DTYPE) / config.head_features
        model.rotary_pos_emb.inv_freq = config.rope_theta**-exponents
    return model.to(DTYPE)  # the norms and the position table are made in torch's default type


def cut(config: ModelConfig, parts: Parts) -> Parts:
    """This rank's parameters under megatron-core's names, as differentiable functions of our parts."""
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()

    def piece(name: str, dim: int = 0) -> Tensor:
        return parts[name].chunk(size, dim)[rank]

    found = {"embedding.word_embeddings.weight": piece("embedding.tokens.weight")}
    if config.position == "learned":
        found["embedding.position_embeddings.weight"] = parts["embedding.positions.weight"]
    if not config.tie_embeddings:
        found["output_layer.weight"] = piece("head.output.weight")
    whole = {"decoder.final_layernorm": "head.norm"}
    for n in range(config.layers):
        layer, block = f"decoder.layers.{n}", f"blocks.{n}"
        whole |= {f"{layer}.input_layernorm": f"{block}.attention_norm", f"{layer}.pre_mlp_layernorm": f"{block}.ffn_norm"}
        whole |= {f"{layer}.self_attention.{x}_layernorm": f"{block}.attention.{x}_norm" for x in "qk" if config.qk_norm}
        found[f"{layer}.self_attention.linear_proj.weight"] = piece(f"{block}.attention.output.weight", 1)
        found[f"{layer}.mlp.linear_fc2.weight"] = piece(f"{block}.ffn.down.weight", 1)
        if config.bias:
            found[f"{layer}.self_attention.linear_proj.bias"] = parts[f"{block}.attention.output.bias"]
            found[f"{layer}.mlp.linear_fc2.bias"] = parts[f"{block}.ffn.down.bias"]
        for kind in ("weight", "bias")[: 1 + config.bias]:
            # Each group's queries, its keys, its values; then the next group.
            groups = [piece(f"{block}.attention.{x}.{kind}").unflatten(0, (config.key_value_heads // size, -1)) for x in "qkv"]
            found[f"{layer}.self_attention.linear_qkv.{kind}"] = torch.cat(groups, 1).flatten(0, 1)
            halves = [f"{block}.ffn.{x}.{kind}" for x in (("gate", "up") if config.gated else ("up",))]
            found[f"{layer}.mlp.linear_fc1.{kind}"] = torch.cat([piece(name) for name in halves])
    for theirs, ours in whole.items():
        found |= {f"{theirs}.{kind}": parts[f"{ours}.{kind}"] for kind in ("weight", "bias") if f"{ours}.{kind}" in parts}
    return found


def load(model: GPTModel, pieces: Parts) -> None:
    parameters = dict(model.named_parameters())
    if parameters.keys() != pieces.keys():
        raise KeyError(f"parameters of megatron-core alone, or of ours alone: {sorted(parameters.keys() ^ pieces.keys())}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != pieces[name].shape:
                raise ValueError(f"{name}: {list(parameter.shape)} in megatron-core, {list(pieces[name].shape)} of ours")
            parameter.copy_(pieces[name])


def gradients(model: GPTModel, pieces: Parts, parts: Parts) -> Parts:
    """Each part's whole gradient on every rank: the transpose of the cut, summed over the ranks.

    Of a whole parameter's gradient each rank holds all, and rank 0's counts; or a share, where megatron-core's
    finalize_model_grads would add them up: behind sequence parallelism, and in the norms of each rank's queries and keys.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    gradient = {name: parameter.grad for name, parameter in model.named_parameters()}
    owned = {id(part) for part in parts.values()}
    for name, parameter in model.named_parameters():
        shared = getattr(parameter, "sequence_parallel", False) or name.endswith(("q_layernorm.weight", "k_layernorm.weight"))
        if id(pieces[name]) in owned and not shared and group.rank() > 0:
            gradient[name] = torch.zeros_like(parameter)
    torch.autograd.backward(list(pieces.values()), [gradient[name] for name in pieces])
    for part in parts.values():
        dist.all_reduce(part.grad, group=group)
    return {name: part.grad for name, part in parts.items() if part.grad is not None}


if __name__ == "__main__":
    main()
