"""Import from Hugging Face: a folder of GPT2LMHeadModel, LlamaForCausalLM or a kind of BERT becomes a model config and named parts.

Only JSON and safetensors are read; nothing is ever unpickled. What the model here cannot express is refused, never approximated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teratron.checkpoint.architecture import Architecture, Settings, Source
from teratron.checkpoint.huggingface_bert import BERTS
from teratron.checkpoint.huggingface_t5 import ENCODER_DECODERS
from teratron.checkpoint.source import Weights, tokenizer_in
from teratron.checkpoint.stream import Entry
from teratron.config import ModelConfig, UserError
from teratron.models import build_model, parts_of

_BUFFERS = re.compile(
    r".*(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq|embeddings\.position_ids)|final_logits_bias|(en|de)coder\.embed_tokens\.weight"
)
"""Constants that files hold among the weights: causal masks, rotary frequencies, places, zeros (BART); and copies of a table of tokens."""


def is_huggingface(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face model (supported or not): it has a `config.json`."""
    return (folder / "config.json").is_file()


def open_huggingface(folder: Path) -> Weights:
    """The weights of a folder, and its tokenizer."""
    config, tensors = load_huggingface(folder)
    parts = [Entry(name, tensor.dtype, tensor.shape, tensor.detach) for name, tensor in tensors.items()]
    return Weights(config, parts, tokenizer_in(folder), str(folder))


def load_huggingface(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read `config.json` and the safetensors files of an architecture in `_ARCHITECTURES`.

    Returns the model's config and its parts by name (as `parts_of`), memory-mapped, in the file's dtype. Dropout is a choice
    of training, not of the weights: it is 0 in the config.

    Raises `UserError` for other architectures, features that the model here lacks, and missing, unexpected, mis-shaped or
    quantised tensors.
    """
    settings = Settings(_read_json(folder / "config.json"))
    try:
        architecture = _architecture(settings)
        config = architecture.config(settings)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    stored = _open_tensors(folder, architecture.prefix)
    tensors: dict[str, Tensor] = {}
    shapes = {part.name: part.shape for part in parts_of(build_model(config, device="meta"))}
    for source in architecture.sources(config):
        if source.name not in stored:
            raise UserError(f"{folder}: {source.name} is missing from the weights; download the folder again")
        tensors |= _cut(stored.pop(source.name), source, shapes, folder)
    twice = architecture.tied if config.tie_embeddings else ()
    spare = [name for name in stored if not _BUFFERS.fullmatch(name) and name not in twice]
    if spare:
        more = f" (and {len(spare) - 1} more)" if len(spare) > 1 else ""
        raise UserError(f"{folder}: the weights hold {spare[0]}{more}, which config.json does not describe: another architecture?")
    return config, tensors


def _cut(tensor: Tensor, source: Source, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, Tensor]:
    """The parts of a stored tensor as views; refuses a wrong shape and numbers that are not plain floating point."""
    rows = [shapes[part][0] for part in source.parts]
    expected = [sum(rows), *shapes[source.parts[0]][1:]]
    if source.transposed:
        expected.reverse()
    if list(tensor.shape) != expected:
        raise UserError(f"{folder}: {source.name} has shape {list(tensor.shape)}, expected {expected} from config.json")
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"{folder}: {source.name} holds {tensor.dtype}, expected float64|float32|bfloat16|float16: use unquantised weights")
    pieces = (tensor.t() if source.transposed else tensor).split(rows)
    return dict(zip(source.parts, pieces, strict=True))


def _open_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Every tensor of a folder by its name without the prefix, memory-mapped."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name.removeprefix(prefix): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a readable safetensors file ({error}); download it again") from None
    return tensors


def _files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the files that `model.safetensors.index.json` names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{index}: 'weight_map' = {places!r}: expected a table of tensor names and files; download it again")
        names = sorted({str(name) for name in places.values()})
        absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if absent:
            raise UserError(f"{index}: names {absent[0]}, which is not in the folder ({len(absent)} of {len(names)} missing); download it")
        return [folder / name for name in names]
    pickled = next(iter(sorted(folder.glob("pytorch_model*.bin"))), None)
    if pickled is None:
        raise UserError(f"{folder}: no model.safetensors or model.safetensors.index.json; download the weights")
    name = _read_json(folder / "config.json")["architectures"][0]
    script = f"from transformers import {name} as M; M.from_pretrained('{folder}').save_pretrained('NEWDIR')"
    raise UserError(f'{pickled}: a pickle, which is never opened here; convert it to safetensors once: python -c "{script}"')


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: found a JSON {type(content).__name__}, expected an object; download it again")
    return content


def _architecture(settings: Settings) -> Architecture:
    """By `architectures`, or by `model_type` where a file has none."""
    by_type = {entry.model_type: name for name, entry in _ARCHITECTURES.items()}
    model_type = settings.get("model_type", "none")
    (name, *_) = settings.get("architectures", []) or [by_type.get(model_type, model_type)]
    if name not in _ARCHITECTURES:
        raise UserError(f"architecture '{name}' is not supported; supported: {', '.join(_ARCHITECTURES)}")
    return _ARCHITECTURES[name]


def _gpt2_config(settings: Settings) -> ModelConfig:
    settings.only("scale_attn_weights", True)
    settings.only("scale_attn_by_inverse_layer_idx", False)
    settings.only("add_cross_attention", False)
    settings.only("quantization_config", None)
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
    return ModelConfig(
        layers=settings.get("n_layer"),
        hidden=settings.get("n_embd"),
        heads=settings.get("n_head"),
        ffn=settings.get("n_inner", 0),
        seq_length=settings.get("n_positions"),
        vocab_size=settings.get("vocab_size"),
        norm_eps=settings.get("layer_norm_epsilon", 1e-5),
        activation=settings.choose("activation_function", "gelu_new", activations),
        tie_embeddings=settings.get("tie_word_embeddings", True),
        init_std=settings.get("initializer_range", 0.02),
    )


def _llama_config(settings: Settings) -> ModelConfig:
    settings.only("quantization_config", None)
    settings.only("mlp_bias", settings.get("attention_bias", False))
    return ModelConfig(
        layers=settings.get("num_hidden_layers"),
        hidden=settings.get("hidden_size"),
        heads=settings.get("num_attention_heads"),
        kv_heads=settings.get("num_key_value_heads", 0),
        head_dim=settings.get("head_dim", 0),
        ffn=settings.get("intermediate_size"),
        seq_length=settings.get("max_position_embeddings"),
        vocab_size=settings.get("vocab_size"),
        norm="rmsnorm",
        norm_eps=settings.get("rms_norm_eps", 1e-6),
        activation=settings.choose("hidden_act", "silu", {"silu": "swiglu", "gelu": "geglu"}),
        position="rope",
        rope_theta=_rope_theta(settings),
        tie_embeddings=settings.get("tie_word_embeddings", False),
        bias=settings.get("attention_bias", False),
        init_std=settings.get("initializer_range", 0.02),
    )


def _rope_theta(settings: Settings) -> Any:
    """The base of the rotary frequencies, where older (`rope_theta`) or newer files (`rope_parameters`) keep it."""
    theta = settings.get("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = settings.get(key, {})
        plain = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) == "default"
        if not plain or rope.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"'{key}' = {json.dumps(rope)} is not supported, expected plain rotary positions (null or type 'default')")
        theta = rope.get("rope_theta", theta)
    return theta


def _gpt2_sources(config: ModelConfig) -> Iterator[Source]:
    yield Source("wte.weight", ("embedding.tokens.weight",))
    yield Source("wpe.weight", ("embedding.positions.weight",))
    for layer in range(config.layers):
        theirs, ours = f"h.{layer}", f"blocks.{layer}"
        for kind in ("weight", "bias"):
            conv1d = kind == "weight"
            yield Source(f"{theirs}.ln_1.{kind}", (f"{ours}.attention_norm.{kind}",))
            yield Source(f"{theirs}.attn.c_attn.{kind}", tuple(f"{ours}.attention.{part}.{kind}" for part in "qkv"), conv1d)
            yield Source(f"{theirs}.attn.c_proj.{kind}", (f"{ours}.attention.output.{kind}",), conv1d)
            yield Source(f"{theirs}.ln_2.{kind}", (f"{ours}.ffn_norm.{kind}",))
            yield Source(f"{theirs}.mlp.c_fc.{kind}", (f"{ours}.ffn.up.{kind}",), conv1d)
            yield Source(f"{theirs}.mlp.c_proj.{kind}", (f"{ours}.ffn.down.{kind}",), conv1d)
    yield Source("ln_f.weight", ("head.norm.weight",))
    yield Source("ln_f.bias", ("head.norm.bias",))
    if not config.tie_embeddings:
        yield Source("lm_head.weight", ("head.output.weight",))


def _llama_sources(config: ModelConfig) -> Iterator[Source]:
    attention = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "output"}
    linear = {f"self_attn.{theirs}": f"attention.{ours}" for theirs, ours in attention.items()}
    linear |= {f"mlp.{name}_proj": f"ffn.{name}" for name in ("gate", "up", "down")}
    yield Source("embed_tokens.weight", ("embedding.tokens.weight",))
    for layer in range(config.layers):
        theirs, ours = f"layers.{layer}", f"blocks.{layer}"
        yield Source(f"{theirs}.input_layernorm.weight", (f"{ours}.attention_norm.weight",))
        yield Source(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.ffn_norm.weight",))
        for kind in ("weight", "bias") if config.bias else ("weight",):
            for name, part in linear.items():
                yield Source(f"{theirs}.{name}.{kind}", (f"{ours}.{part}.{kind}",))
    yield Source("norm.weight", ("head.norm.weight",))
    if not config.tie_embeddings:
        yield Source("lm_head.weight", ("head.output.weight",))


_ARCHITECTURES = {
    "GPT2LMHeadModel": Architecture("gpt2", "transformer.", _gpt2_config, _gpt2_sources),
    "LlamaForCausalLM": Architecture("llama", "model.", _llama_config, _llama_sources),
    **BERTS,
    **ENCODER_DECODERS,
}
