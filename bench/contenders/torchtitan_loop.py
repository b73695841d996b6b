"""torchtitan's Llama in the plain loop: its own trainer wants CUDA, its model does not. It has no GPT-2."""

from __future__ import annotations

from job import Gate, Job, Shape
from torch import Tensor
from torchtitan.models.llama3.model.args import TransformerModelArgs
from torchtitan.models.llama3.model.model import Transformer

from contenders.plain import load, loop


def train(job: Job, gate: Gate) -> None:
    shape = job.shape
    arguments = TransformerModelArgs(
        dim=shape.hidden, n_layers=shape.layers, n_heads=shape.heads, n_kv_heads=shape.kv_heads, vocab_size=shape.vocab_size,
        multiple_of=shape.ffn, ffn_dim_multiplier=1e-3, norm_eps=shape.norm_eps, rope_theta=shape.rope_theta, max_seq_len=shape.seq_length,
    )  # fmt: skip
    model = load(Transformer(arguments), state(shape, job.weights())).to(job.device)
    loop(job, gate, model, model)


def state(shape: Shape, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by torchtitan's names; it rotates neighbouring features where the others rotate halves of a head."""
    found = {
        "tok_embeddings.weight": given["model.embed_tokens.weight"],
        "norm.weight": given["model.norm.weight"],
        "output.weight": given["lm_head.weight"],
    }
    names = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {f"attention.w{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    names |= {"feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj"}
    for n in range(shape.layers):
        for theirs, ours in names.items():
            weight = given[f"model.layers.{n}.{ours}.weight"]
            found[f"layers.{n}.{theirs}.weight"] = paired(weight, shape) if theirs.endswith(("wq", "wk")) else weight
    return found


def paired(weight: Tensor, shape: Shape) -> Tensor:
    """Rows (i, i + D/2) of each head made neighbours."""
    width = shape.hidden // shape.heads
    return weight.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
