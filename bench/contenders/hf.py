"""`transformers` models in a plain loop; GPT2LMHeadModel always has biases."""

from __future__ import annotations

from typing import Any

import transformers.models.auto.modeling_auto  # noqa: F401  (before the memory of imports is read)
from job import Gate, Job
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from contenders.plain import load, loop


def train(job: Job, gate: Gate) -> None:
    model = build(job)
    loop(job, gate, model, lambda x: model(x, use_cache=False).logits)


def build(job: Job) -> Any:
    """The job's model with the job's weights, on its device, for training."""
    shape, state = job.shape, job.weights()
    common: dict[str, Any] = {"vocab_size": shape.vocab_size, "attn_implementation": "sdpa", "tie_word_embeddings": shape.tied}
    if shape.llama:
        common |= {"hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "intermediate_size": shape.ffn}
        common |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "rms_norm_eps": shape.norm_eps}
        rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
        model: Any = LlamaForCausalLM(LlamaConfig(**common, max_position_embeddings=shape.seq_length, rope_parameters=rope))
    else:
        common |= {"n_embd": shape.hidden, "n_layer": shape.layers, "n_head": shape.heads, "n_positions": shape.seq_length}
        common |= {"activation_function": "gelu", "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(**common))
        # its Conv1D stores matrices [in, out]
        state = {key: value.t() if value.dim() > 1 and ".h." in key else value for key, value in state.items()}
    return load(model, state).train().to(job.device)
