"""megatron-core's checkpoints on CPU: `python megatron_checkpoint_worker.py FOLDER`, with megatron-core on PYTHONPATH.

FOLDER/cases.json maps a case to its model (fields of ModelConfig), its tensor degree and inputs, a safetensors file of our parts and
`batch.tokens`. Of each case megatron-core writes FOLDER/CASE.theirs, a run in the format torch_dist, and reads FOLDER/CASE.ours and
FOLDER/CASE.ours-legacy; the logits of all three become FOLDER/CASE.safetensors.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron_worker import ACTIVATIONS, DTYPE, cut, load, patch
from safetensors.torch import load_file, save_file
from torch import Tensor

from teratron.config import ModelConfig

# isort: split
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils

WORLD, STEP = 2, 7


def main() -> None:
    folder = Path(sys.argv[1])
    cases = json.loads((folder / "cases.json").read_text("utf-8"))
    patch()
    torch.cuda.synchronize = lambda device=None: None
    filesystem_async._process_memory = lambda: 0  # needs psutil
    moe_utils.te_general_gemm = None
    torch.multiprocessing.start_processes(run_rank, (folder, cases), nprocs=WORLD, start_method="fork")


def run_rank(rank: int, folder: Path, cases: dict[str, Any]) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(seconds=600), WORLD, rank)
    for name, case in cases.items():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=case["tensor"])
        found = run(ModelConfig(**case["model"]), load_file(folder / case["inputs"]), folder / name)
        parallel_state.destroy_model_parallel()
        if rank == 0:
            save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / f"{name}.safetensors")
    dist.destroy_process_group()


def run(config: ModelConfig, inputs: dict[str, Tensor], place: Path) -> dict[str, Tensor]:
    """Logits of the model that is saved, and of those that are loaded."""
    tokens, parts = inputs["batch.tokens"], {name: tensor for name, tensor in inputs.items() if not name.startswith("batch.")}
    for name in parts.keys() & {"embedding.tokens.weight", "head.output.weight"}:
        parts[name] = F.pad(parts[name], (0, 0, 0, padded(config) - config.vocab_size))
    model = build(config)
    load(model, cut_mixture(config, parts) if config.experts else cut(config, parts))
    run_folder = place.with_suffix(".theirs")
    save(config, model, run_folder)
    found = {"saved": logits(model, tokens)}
    for source in ("theirs", "ours"):
        found[source] = logits(restored(build(config), place.with_suffix(f".{source}") / f"iter_{STEP:07d}"), tokens)
    legacy = place.with_suffix(".ours-legacy") / f"iter_{STEP:07d}"
    return found | {"legacy": logits(restored_legacy(build(config), legacy), tokens)}


def build(config: ModelConfig) -> GPTModel:
    """This rank's part of a model, filled with what is no number."""
    mixture = {}
    if config.experts:
        mixture = {
            "num_moe_experts": config.experts, "moe_router_topk": config.experts_per_token, "moe_ffn_hidden_size": config.expert_width,
            "moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "allgather", "moe_permute_fusion": False,
        }  # fmt: skip
    settings = TransformerConfig(
        num_layers=config.layers, hidden_size=config.hidden, ffn_hidden_size=config.ffn_width,
        num_attention_heads=config.heads, num_query_groups=config.key_value_heads, kv_channels=config.head_features,
        normalization="RMSNorm" if config.norm == "rmsnorm" else "LayerNorm", layernorm_epsilon=config.norm_eps,
        activation_func=ACTIVATIONS[config.activation], gated_linear_unit=config.gated, add_bias_linear=config.bias,
        qk_layernorm=config.qk_norm, hidden_dropout=0.0, attention_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(), bias_activation_fusion=False,
        params_dtype=DTYPE, use_cpu_initialization=True, perform_initialization=False, masked_softmax_fusion=False, **mixture,
    )  # fmt: skip
    spec = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=config.experts or None, qk_layernorm=config.qk_norm, normalization=settings.normalization
    )
    rope = config.position == "rope"
    model = GPTModel(
        settings, spec, padded(config), config.positions, share_embeddings_and_output_weights=config.tie_embeddings,
        position_embedding_type="rope" if rope else "learned_absolute",
    )  # fmt: skip
    if rope:  # made in float32
        exponents = torch.arange(0, config.head_features, 2, dtype=DTYPE) / config.head_features
        model.rotary_pos_emb.inv_freq = config.rope_theta**-exponents
    for parameter in model.to(DTYPE).parameters():
        parameter.data.fill_(float("nan"))
    return model


def padded(config: ModelConfig) -> int:
    """Rows of the table of tokens, padded as Megatron-LM does."""
    multiple = config.vocab_multiple * parallel_state.get_tensor_model_parallel_world_size()
    return -(-config.vocab_size // multiple) * multiple


def cut_mixture(config: ModelConfig, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a model with experts, whole, under megatron-core's names."""
    dense = ModelConfig(**{**config.__dict__, "experts": 0, "ffn": config.expert_width, "expert_ffn": 0, "normalise_gates": False})
    stand_in = {
        f"blocks.{n}.ffn.{x}.weight": parts[f"blocks.{n}.ffn.experts.{x}.weight"][0]
        for n in range(config.layers)
        for x in ("gate", "up", "down")
    }
    found = {name: tensor for name, tensor in cut(dense, parts | stand_in).items() if ".mlp." not in name}
    for n in range(config.layers):
        mlp, ours = f"decoder.layers.{n}.mlp", f"blocks.{n}.ffn"
        found[f"{mlp}.router.weight"] = parts[f"{ours}.router.weight"]
        for e in range(config.experts):
            halves = [parts[f"{ours}.experts.{x}.weight"][e] for x in ("gate", "up")]
            found[f"{mlp}.experts.local_experts.{e}.linear_fc1.weight"] = torch.cat(halves)
            found[f"{mlp}.experts.local_experts.{e}.linear_fc2.weight"] = parts[f"{ours}.experts.down.weight"][e]
    return found


def save(config: ModelConfig, model: GPTModel, folder: Path) -> None:
    """As Megatron-LM does: the newest iteration's number beside its folder, arguments in what is common to all."""
    iteration = folder / f"iter_{STEP:07d}"
    if dist.get_rank() == 0:
        iteration.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text(str(STEP))
    dist.barrier()
    args = Namespace(
        num_layers=config.layers, hidden_size=config.hidden, ffn_hidden_size=config.ffn_width, num_attention_heads=config.heads,
        group_query_attention=config.kv_heads > 0, num_query_groups=config.key_value_heads, kv_channels=config.head_features,
        seq_length=config.seq_length, max_position_embeddings=config.positions, padded_vocab_size=padded(config),
        vocab_size=config.vocab_size, make_vocab_size_divisible_by=config.vocab_multiple, add_bias_linear=config.bias,
        untie_embeddings_and_output_weights=not config.tie_embeddings, swiglu=config.gated, bias_gelu_fusion=False,
        normalization="RMSNorm" if config.norm == "rmsnorm" else "LayerNorm", norm_epsilon=config.norm_eps, qk_layernorm=config.qk_norm,
        position_embedding_type="rope" if config.position == "rope" else "learned_absolute", rotary_base=int(config.rope_theta),
        num_experts=config.experts or None, moe_router_topk=config.experts_per_token, moe_ffn_hidden_size=config.expert_ffn or None,
        hidden_dropout=config.dropout, attention_dropout=config.attention_dropout, init_method_std=config.init_std,
        params_dtype=DTYPE, tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
    )  # fmt: skip
    dist_checkpointing.save({**model.sharded_state_dict(), "args": args, "iteration": STEP, "checkpoint_version": 3.0}, str(iteration))


def restored(model: GPTModel, folder: Path) -> GPTModel:
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder)), strict=False)
    return complete(model)


def restored_legacy(model: GPTModel, folder: Path) -> GPTModel:
    """With the names of megatron-core's own layers in place of Transformer Engine's."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    content = torch.load(folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt", weights_only=False)["model"]
    content = {re.sub(r"self_attention\.linear_qkv\.layer_norm_", "input_layernorm.", name): tensor for name, tensor in content.items()}
    content = {re.sub(r"mlp\.linear_fc1\.layer_norm_", "pre_mlp_layernorm.", name): tensor for name, tensor in content.items()}
    model.load_state_dict(content, strict=True)
    return complete(model)


def complete(model: GPTModel) -> GPTModel:
    """A model of whose numbers none is left out."""
    left = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    if left:
        raise RuntimeError(f"not loaded: {left}")
    return model


def logits(model: GPTModel, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    unseen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    return model(tokens, positions, unseen, runtime_gather_output=True).detach()


if __name__ == "__main__":
    main()
