"""The keys of a run beside its model, from Megatron-LM's arguments."""

from __future__ import annotations

from typing import Any

from teratron.checkpoint.megatron.arguments import Given, Kind
from teratron.config import UserError

_STYLES = {"constant": "constant", "linear": "linear", "cosine": "cosine", "inverse-square-root": "inverse_sqrt", "WSD": "wsd"}
_SHAPES = {"exponential": "exponential", "linear": "linear", "cosine": "cosine", "minus_sqrt": "sqrt"}
_OPTIMIZERS = {"adam": "adamw", "sgd": "sgd", "lion": "lion", "muon": "muon", "dist_muon": "muon"}


def run_keys(given: Given, world: int = 0) -> dict[str, Any]:
    """Every `section.key` but the model's; world: processes, 0 = as few as the degrees need. Raises `UserError` that names the argument."""
    return (
        _parallel(given) | _batches(given, world) | _objective(given) | _data(given) | _optimizer(given) | _schedule(given) | _rest(given)
    )


def ranks_of(given: Given) -> int:
    """Processes that hold one copy of the model."""
    return int(given["tensor_model_parallel_size"] * given["pipeline_model_parallel_size"] * given["context_parallel_size"])


def _parallel(given: Given) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "parallel.tensor": given["tensor_model_parallel_size"],
        "parallel.sequence": bool(given["sequence_parallel"]) and given["tensor_model_parallel_size"] > 1,
        "parallel.pipeline": given["pipeline_model_parallel_size"],
        "parallel.context": given["context_parallel_size"],
        "parallel.expert": given["expert_model_parallel_size"],
        "parallel.shard": "optimizer" if given["use_distributed_optimizer"] else "none",
    }
    if given["context_parallel_size"] > 1:
        keys["parallel.context_method"] = given.choose("cp_comm_type", {"p2p": "ring", "all_gather": "ring", "a2a": "all_to_all"})
    chunks = given["num_virtual_stages_per_pipeline_rank"]
    per_chunk = given["num_layers_per_virtual_pipeline_stage"]
    if per_chunk:
        chunks = given.number("num_layers") // given["pipeline_model_parallel_size"] // per_chunk
    if chunks and chunks > 1:
        keys |= {"parallel.schedule": "interleaved", "parallel.chunks": chunks}
    return keys


def _batches(given: Given, world: int) -> dict[str, Any]:
    """Batches and steps."""
    micro = given.number("micro_batch_size")
    copies = max(1, world // ranks_of(given)) if world else given["data_parallel_size"]
    whole = given["global_batch_size"] or micro * copies
    keys = {"train.micro_batch": micro, "train.global_batch": whole, "train.steps": steps_of(given, whole)}
    ramp = given["rampup_batch_size"]
    return keys | ({"train.batch_schedule": " ".join(map(str, ramp))} if ramp else {})


def steps_of(given: Given, global_batch: int) -> int:
    """Optimizer steps of the run."""
    if given["train_iters"]:
        return given.number("train_iters")
    if not given["train_samples"]:
        raise UserError("--train-iters is missing: expected the number of optimizer steps, or --train-samples")
    return given.number("train_samples") // global_batch


def _objective(given: Given) -> dict[str, Any]:
    kinds: dict[Kind, str] = {"gpt": "next_token", "bert": "masked", "t5": "span_corruption"}
    keys: dict[str, Any] = {"objective.name": kinds[given.kind], "objective.label_smoothing": given["label_smoothing"]}
    if given.kind == "bert":
        sentence = "order" if given["bert_binary_head"] else "none"
        keys |= {"objective.sentence": sentence, "objective.max_ngram": 3, "objective.mask_rate": given["mask_prob"]}
    return keys | ({"objective.noise_density": given["mask_prob"]} if given.kind == "t5" else {})


def _data(given: Given) -> dict[str, Any]:
    keys: dict[str, Any] = {"data.order": "megatron" if given.kind == "gpt" else "native", "data.split": str(given["split"])}
    train = given["data_path"] or given["train_data_path"]
    keys |= {"data.train": _words(train)} if train else {}
    if given["valid_data_path"]:
        keys["data.valid"] = _words(given["valid_data_path"])
    tokenizer = given["tokenizer_model"] or given["vocab_file"] or ("wordpiece" if given.kind == "bert" else "")
    keys |= {"data.tokenizer": str(tokenizer)} if tokenizer else {}
    isolated = given["reset_attention_mask"] and given["reset_position_ids"]
    return keys | {
        "data.isolate_documents": bool(isolated),
        "data.mask_end_of_document": bool(given["eod_mask_loss"]) and given.kind == "gpt",
    }


def _words(value: Any) -> list[str]:
    return [str(word) for word in (value if isinstance(value, (list, tuple)) else [value])]


def _optimizer(given: Given) -> dict[str, Any]:
    name = given.choose("optimizer", _OPTIMIZERS)
    keys: dict[str, Any] = {
        "optim.name": name, "optim.beta1": given["adam_beta1"], "optim.beta2": given["adam_beta2"], "optim.eps": given["adam_eps"],
        "optim.clip": given["clip_grad"], "optim.weight_decay": given["weight_decay"],
    }  # fmt: skip
    if name == "sgd":
        keys |= {"optim.momentum": given["sgd_momentum"], "optim.nesterov": False}
    if name == "muon":
        keys["optim.momentum"] = given["muon_momentum"]
    ramp = given["weight_decay_incr_style"]
    if ramp != "constant":
        keys |= {"optim.weight_decay_ramp": given.choose("weight_decay_incr_style", {"linear": "linear", "cosine": "cosine"})}
        keys |= {"optim.weight_decay_start": given["start_weight_decay"] or 0.0, "optim.weight_decay": given["end_weight_decay"]}
    return keys


def _schedule(given: Given) -> dict[str, Any]:
    batch = given["global_batch_size"] or given.number("micro_batch_size")
    steps, style = steps_of(given, batch), given.choose("lr_decay_style", _STYLES)
    rate = given["lr"]
    if rate is None:
        raise UserError("--lr is missing: expected the highest learning rate")
    decay = given["lr_decay_iters"] or (given["lr_decay_samples"] or 0) // batch or steps
    keys: dict[str, Any] = {"optim.schedule": style, "optim.lr": rate, "optim.warmup_steps": _warmup(given, decay, batch)}
    keys |= {"optim.min_lr": given["min_lr"]} if style != "constant" else {}
    if style == "wsd":
        length = given["lr_wsd_decay_iters"] or (given["lr_wsd_decay_samples"] or 0) // batch
        if not length:
            raise UserError("--lr-wsd-decay-iters is missing: expected the steps of the last decay of --lr-decay-style WSD")
        return keys | {"optim.decay_steps": length, "optim.decay_shape": given.choose("lr_wsd_decay_style", _SHAPES)}
    return keys | ({"optim.decay_steps": decay} if style in ("linear", "cosine") and decay != steps else {})


def _warmup(given: Given, decay: int, batch: int) -> int:
    if given["lr_warmup_fraction"]:
        return int(given["lr_warmup_fraction"] * decay)
    return int(given["lr_warmup_iters"] or (given["lr_warmup_samples"] or 0) // batch)


def _rest(given: Given) -> dict[str, Any]:
    """Precision, recomputation, evaluation, saving."""
    half = "fp8" if given["fp8"] or given["fp8_format"] else "bf16" if given["bf16"] else "fp16" if given["fp16"] else "fp32"
    keys: dict[str, Any] = {
        "train.precision": half, "train.seed": given["seed"], "train.eval_every": given["eval_interval"],
        "train.eval_batches": given["eval_iters"], "train.deterministic": bool(given["deterministic_mode"]),
        "checkpoint.every": given["save_interval"] or 0,
    }  # fmt: skip
    if half == "fp16":
        names = ("initial_loss_scale", "min_loss_scale", "loss_scale_window")
        keys |= {f"optim.{name}": given[name] for name in names} | {"optim.loss_scale_hysteresis": given["hysteresis"]}
        keys |= {"optim.loss_scale": given["loss_scale"]} if given["loss_scale"] else {}
    if given["recompute_granularity"]:
        keys["train.recompute"] = given.choose("recompute_granularity", {"full": "full", "selective": "selective"})
    elif given["recompute_activations"]:
        keys["train.recompute"] = "selective"
    named = {"log_interval": "log.every", "wandb_project": "log.wandb"}
    return keys | {key: given[name] for name, key in named.items() if given[name]}
