"""A launch script of Megatron-LM becomes a config here, with a line for every argument that has no equivalent."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from teratron.checkpoint.megatron.arguments import ABSENT, Given, Kind, flag, model_keys
from teratron.checkpoint.megatron.shell import parse_flags, read_script
from teratron.checkpoint.megatron.training import ranks_of, run_keys
from teratron.config import Config, UserError

_TEXT = re.compile(r".*(path|_file|_model|_dir|split|save|load|project|name)$")
"""Arguments whose words are never numbers."""
_OPPOSITES: Mapping[str, tuple[str, Any]] = {
    "no_bias_gelu_fusion": ("bias_gelu_fusion", False),
    "bert_no_binary_head": ("bert_binary_head", False),
    "checkpoint_activations": ("recompute_granularity", "full"),
    "model_parallel_size": ("tensor_model_parallel_size", None),
    "batch_size": ("micro_batch_size", None),
    "warmup": ("lr_warmup_fraction", None),
    "DDP_impl": ("distributed_backend", None),
}
"""Older or negative arguments, and what they set; None = the same value."""
_NEEDLESS: Mapping[str, str] = {
    "kernels are chosen by themselves": r"use_flash_attn.*|attention_backend|transformer_impl|.*fusion|tp_comm_.*|moe_grouped_gemm|"
    r"moe_token_dispatcher_type|moe_permute_fusion|use_mcore_models|use_legacy_models|.*cuda_graph.*|manual_gc.*|use_cpu_initialization|"
    r"moe_enable_deepep|moe_flex_.*|moe_shared_expert_overlap|cross_entropy_.*|gradient_accumulation_fusion|te_rng_tracker|"
    r"distribute_saved_activations|microbatch_group_size.*|recompute_(method|num_layers|modules)|fp8_.*|(first|last)_.*_in_bf16",
    "communication overlaps by itself": r"overlap_.*|defer_embedding.*|delay_.*|align_.*|ddp_.*|use_ring_exchange_p2p|use_nccl_ub|"
    r"distributed_timeout_minutes|distributed_backend|num_distributed_optimizer_instances|data_parallel_sharding_strategy|use_tp_pp_dp_mapping",
    "a run's folder holds all: give --run DIR, and the same command goes on": r"save|load|no_(load|save)_.*|finetune|ckpt_.*|use_dist_ckpt|"
    r"dist_ckpt_.*|auto_detect_ckpt_format|use_checkpoint_.*|exit_on_missing_checkpoint|override_opt_param_scheduler|non_persistent_.*|"
    r"async_save|use_persistent_ckpt_worker|retain_.*|save_retain_interval",
    "metrics.jsonl, report.html and TensorBoard have it always": r"log_.*|tensorboard_.*|timing_.*|no_log_.*|"
    r"wandb_(exp_name|save_dir|entity)|no_barrier_.*|one_logger.*|enable_one_logger",
    "nothing to choose here": r"num_workers|dataloader_type|data_cache_path|no_create_attention_mask.*|no_mmap.*|"
    r"num_dataset_builder_threads|tokenizer_type|merge_file|vocab_extra_ids|no_position_embedding|position_embedding_type|"
    r"use_rotary_position_embeddings|mock_data|"
    r"lazy_mpu_init|skip_train|empty_unused_memory_level|check_for_.*|no_check_for_.*|rerun_mode|no_load_rng|decoder_seq_length|"
    r"short_seq_prob|make_vocab_size_divisible_by|rope_type|expert_tensor_parallel_size",
    "the numbers are the same without": r"apply_query_key_layer_scaling|attention_softmax_in_fp32|accumulate_allreduce_grads_in_fp32|"
    r"calculate_per_token_loss|grad_reduce_in_fp32|fp32_residual_connection|moe_router_dtype|fp16_lm_cross_entropy|no_rope_fusion",
}
"""Arguments that need no equivalent, by the reason."""
_NOTED: Mapping[str, str] = {
    "exit_interval": "stops early: train.stop_after",
    "exit_duration_in_mins": "Slurm's signal saves and ends a run: see docs/slurm.md",
    "lr_warmup_init": "warm-up begins at 0",
    "moe_expert_capacity_factor": "capacity is per sequence here, not per micro-batch: model.capacity",
    "mask_prob": "masks are drawn for every sample anew",
    "muon_scale_mode": "optim.muon_scale",
    "standalone_embedding_stage": "stages are cut by parallel.split",
    "account_for_embedding_in_pipeline_split": "stages are cut by parallel.split",
    "account_for_loss_in_pipeline_split": "stages are cut by parallel.split",
    "decoder_first_pipeline_num_layers": "stages are cut by parallel.split",
    "decoder_last_pipeline_num_layers": "stages are cut by parallel.split",
    "pipeline_model_parallel_layout": "stages are cut by parallel.split",
    "use_torch_fsdp2": "parallel.shard = parameters",
    "use_megatron_fsdp": "parallel.shard = parameters",
    "use_custom_fsdp": "parallel.shard = parameters",
    "test_data_path": "evaluation is of data.valid",
    "per_split_data_args_path": "give data.train and data.valid",
    "data_args_path": "give data.train",
    "sft": "fine-tuning has a verb of its own: teratron finetune",
    "optimizer_cpu_offload": "optimizer state stays on the devices: parallel.shard makes it small",
    "cpu_offloading": "activations stay on the devices: train.recompute makes them few",
}
"""Arguments without an equivalent, and what to do."""
_BY_DEFAULT: Mapping[str, str] = {
    "hidden_dropout": "model.dropout", "attention_dropout": "model.attention_dropout", "weight_decay": "optim.weight_decay",
    "adam_beta2": "optim.beta2", "lr_decay_style": "optim.schedule", "split": "data.split", "eval_interval": "train.eval_every",
    "eval_iters": "train.eval_batches", "save_interval": "checkpoint.every",
}  # fmt: skip
"""Arguments whose defaults differ from those here."""


@dataclass(frozen=True)
class Translation:
    """What a launch script is here."""

    config: Config
    keys: Mapping[str, Any]
    processes: int
    nodes: int
    notes: tuple[str, ...]

    def command(self, name: str) -> str:
        """How the run is started."""
        train = f"train {name} --run RUN"
        if self.nodes == 1:
            return f"teratron {train} --nproc {self.processes}"
        return f"torchrun --nnodes {self.nodes} --nproc-per-node {self.processes // self.nodes} -m teratron {train}"

    def to_toml(self, name: str) -> str:
        """The keys that differ from the defaults, behind the command and the notes as comments."""
        usual, found = dict(Config().items()), dict(self.config.items())
        lines, section = [f"# {self.command(name)}", *(f"# {note}" for note in self.notes)], ""
        for line in self.config.to_toml().splitlines():
            section = line if line.startswith("[") else section
            key = f"{section.strip('[]')}.{line.partition(' = ')[0]}"
            if key in found and found[key] != usual[key]:
                lines += ["", section] if section not in lines else []
                lines.append(line)
        return "\n".join(lines) + "\n"


def translate_script(path: Path) -> Translation:
    """Read a launch script, or a file with a list of arguments. Raises `UserError` that names what cannot be expressed here."""
    words, left_out = read_script(path)
    kind: Kind = "bert" if any("bert" in Path(word).name for word in words if word.endswith(".py")) else "gpt"
    kind = "t5" if any("t5" in Path(word).name for word in words if word.endswith(".py")) else kind
    try:
        found = translate(words, kind)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    notes = [f"{name}: stands in a condition or loop, which was left out" for name in left_out]
    return replace(found, notes=(*notes, *found.notes))


def translate(words: Sequence[str], kind: Kind = "gpt") -> Translation:
    """The same of the words of a command."""
    flags = parse_flags(list(words))
    per_node = _launched(flags, "nproc_per_node")
    nodes = _launched(flags, "nnodes") or int(per_node > 0)
    script = next((place for place, word in enumerate(words) if word.endswith(".py")), -1)
    typed = {}
    for name, values in parse_flags(list(words[script + 1 :])).items():
        real, value = _OPPOSITES.get(name, (name, None))
        typed[real] = _value(name, values) if value is None else value
    given = Given(typed, kind)
    keys = {f"model.{name}": value for name, value in model_keys(given).items()} | run_keys(given, nodes * per_node)
    config = Config().override(keys)
    processes = nodes * per_node or ranks_of(given) * int(given["data_parallel_size"])
    return Translation(config, keys, processes, nodes or 1, tuple(_notes(typed, given.read, config)))


def _launched(flags: Mapping[str, list[str]], name: str) -> int:
    """A number that torchrun is given; 0 = none, or one that the script does not set."""
    values = flags.get(name, [""])
    return int(values[0]) if values and values[0].isdigit() else 0


def _value(name: str, words: list[str]) -> Any:
    """The words of an argument as numbers where they are, True without any."""
    unset = next((found[0] for word in words if (found := re.search(r"\$[{(].*", word))), "")
    if _TEXT.match(name):
        return words[0] if len(words) == 1 else words or True
    if unset and not any(re.fullmatch(pattern, name) for pattern in _NEEDLESS.values()):
        raise UserError(f"{flag(name)} = {unset}: the script does not say what that is: put the value in its place")
    values = [_number(word) for word in words]
    return True if not values else values[0] if len(values) == 1 else values


def _number(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return {"None": None, "True": True, "False": False}.get(word, word)


def _notes(typed: Mapping[str, Any], read: set[str], config: Config) -> list[str]:
    """A line for every argument without an equivalent, then for defaults of Megatron-LM that differ from those here."""
    notes: list[str] = []
    needless: dict[str, list[str]] = {}
    for name in sorted(typed.keys() - read - ABSENT.keys()):
        reason = next((reason for reason, pattern in _NEEDLESS.items() if re.fullmatch(pattern, name)), None)
        if reason is None:
            notes.append(f"{flag(name)}: {_NOTED.get(name, 'has no equivalent here, and was left out')}")
        else:
            needless.setdefault(reason, []).append(flag(name))
    notes += [f"{flag(name)}: {instead}" for name, instead in _NOTED.items() if name in typed and name in read]
    notes += [f"not needed, {reason}: {' '.join(names)}" for reason, names in needless.items()]
    usual, found = dict(Config().items()), dict(config.items())
    for name, key in _BY_DEFAULT.items():
        if name not in typed and found[key] != usual[key]:
            notes.append(f"{key} = {found[key]} is Megatron-LM's default ({flag(name)} was not given); here it would be {usual[key]}")
    return notes
