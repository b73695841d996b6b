"""Hugging Face folders both ways: their logits are ours, ours load there and give the same, and tensors come back bit for bit."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from teratron.checkpoint import open_weights
from teratron.checkpoint.huggingface import write_huggingface
from teratron.checkpoint.huggingface.reading import ARCHITECTURES, read_config
from teratron.checkpoint.huggingface.settings import Settings
from teratron.checkpoint.probe import logits_of
from teratron.config import UserError

transformers = pytest.importorskip("transformers", reason="transformers is the oracle: pip install transformers")

VOCAB, LENGTH = 97, 24
PLAIN = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
LONG = {**PLAIN, "max_position_embeddings": 64}
GROUPED = {**LONG, "num_key_value_heads": 2, "head_dim": 16}
GPT2 = {"n_layer": 2, "n_embd": 48, "n_head": 4, "n_positions": 40, "vocab_size": VOCAB}
BERT = {**PLAIN, "max_position_embeddings": LENGTH, "type_vocab_size": 2}
ROBERTA = {**BERT, "max_position_embeddings": LENGTH + 2, "type_vocab_size": 1, "pad_token_id": 1}
T5 = {"num_layers": 2, "d_model": 48, "d_ff": 80, "num_heads": 4, "d_kv": 10, "vocab_size": VOCAB, "decoder_start_token_id": 0}
BART = {
    "encoder_layers": 2, "decoder_layers": 2, "d_model": 48, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 40,
}  # fmt: skip
DEEPSEEK = {
    **LONG, "num_hidden_layers": 3, "moe_intermediate_size": 24, "num_key_value_heads": 4, "n_shared_experts": 2, "n_routed_experts": 8,
    "kv_lora_rank": 20, "q_lora_rank": 28, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "n_group": 4, "topk_group": 2,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
SCALES = {"mscale": 0.707, "mscale_all_dim": 0.707}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-base": ("GPT2Model", GPT2),
    "gpt2-tags": ("GPT2ForTokenClassification", {**GPT2, "num_labels": 5}),
    "llama": ("LlamaForCausalLM", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "llama3": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-yarn": ("LlamaForCausalLM", {**LONG, "rope_parameters": YARN}),
    "llama-linear": ("LlamaForCausalLM", {**LONG, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 9}),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 5}),
    "qwen2": ("Qwen2ForCausalLM", {**LONG, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", GROUPED),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {**GROUPED, "num_hidden_layers": 3, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True,
         "decoder_sparse_step": 2},
    ),
    "gemma": ("GemmaForCausalLM", GROUPED),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**GROUPED, "query_pre_attn_scalar": 16, "sliding_window": 9, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {**GROUPED, "query_pre_attn_scalar": 16, "sliding_window": 9, "num_hidden_layers": 3, "sliding_window_pattern": 2,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e2}}},
    ),
    "llama-texts": ("LlamaForSequenceClassification", {**GROUPED, "num_labels": 3}),
    "gpt2-texts": ("GPT2ForSequenceClassification", {**GPT2, "num_labels": 3}),
    "gpt-neox": ("GPTNeoXForCausalLM", {**LONG, "rotary_pct": 0.5, "hidden_act": "gelu"}),
    "cohere": ("CohereForCausalLM", {**LONG, "num_key_value_heads": 2, "logit_scale": 0.3}),
    "bloom": ("BloomForCausalLM", {"vocab_size": VOCAB, "hidden_size": 48, "n_layer": 2, "n_head": 4}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", {**DEEPSEEK, "rope_parameters": {**YARN, **SCALES}}),
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        {**DEEPSEEK, "topk_method": "group_limited_greedy", "head_dim": 8, "routed_scaling_factor": 1.5, "q_lora_rank": None},
    ),
    "bert": ("BertForMaskedLM", {**BERT, "hidden_act": "gelu_new"}),
    "bert-sentences": ("BertForPreTraining", BERT),
    "bert-base": ("BertModel", BERT),
    "bert-classes": ("BertForSequenceClassification", {**BERT, "num_labels": 3}),
    "bert-tags": ("BertForTokenClassification", {**BERT, "num_labels": 7}),
    "roberta": ("RobertaForMaskedLM", ROBERTA),
    "roberta-classes": ("RobertaForSequenceClassification", {**ROBERTA, "num_labels": 3}),
    "megatron-bert": ("MegatronBertForPreTraining", BERT),
    "xlnet": ("XLNetLMHeadModel", {"vocab_size": VOCAB, "d_model": 48, "n_layer": 2, "n_head": 4, "d_inner": 80}),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-1.1": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("BartForConditionalGeneration", BART),
}  # fmt: skip
FREE = {"transformers_version", "_name_or_path", "dtype", "id2label", "label2id", "architectures", "decoder_start_token_id"}
"""Of their configs: what says nothing of the model, or comes from the tokenizer, of which there is none."""


def theirs(name: str) -> Any:
    """A `transformers` model with random weights that make logits of size 1."""
    kind, settings = MODELS[name]
    cls = getattr(transformers, kind)
    config = cls.config_class(**settings, attn_implementation="eager")
    config._experts_implementation = "eager"
    model = cls(config)
    if name == "t5-1.1":  # the class ties it all the same
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB, 48))
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and "inv_freq" not in path and "final_logits_bias" not in path and tensor.dim():
                centre = 1.0 if tensor.dim() == 1 and path.endswith("weight") and "gemma" not in name else 0.0
                scale = 1.0 if "relative" in path or path == "shared.weight" else 0.15
                tensor.copy_(centre + scale * torch.randn(tensor.shape, generator=draw))
    return model.float().eval()


def answer(model: Any, tokens: Tensor) -> Tensor:
    """What their model gives where ours gives logits."""
    more: dict[str, Any] = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    if model.config.model_type == "xlnet":
        more = {"perm_mask": torch.ones(tokens.shape[1], tokens.shape[1]).triu(1)[None]}
    with torch.inference_mode():
        given = model(tokens, **more)
    found = [getattr(given, name) for name in ("logits", "prediction_logits", "last_hidden_state") if name in given]
    return found[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exchange")


@pytest.mark.parametrize("name", MODELS)
def test_their_logits_are_ours_and_all_comes_back(name: str, folders: Path) -> None:
    model, tokens = theirs(name), torch.randint(3, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(5))
    model.save_pretrained(folders / name)
    weights = open_weights(folders / name)
    expected, found = answer(model, tokens), logits_of(weights, tokens)
    if expected.dim() == 2:  # of a whole text: encoders score it at the first token, decoders at the last
        found = found[:, 0 if weights.config.family == "encoder" else -1]
    scale = float(expected.abs().max())
    assert scale > 0.5
    assert float((found - expected).abs().max()) <= 1e-5 * scale

    out = folders / f"{name}-back"
    write_huggingface(weights, out, 10**9)
    before, after = load_file(folders / name / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    apart = [path for path in before if not torch.equal(before[path], after[path])]
    assert [path for path in apart if not path.endswith(("seg_embed", "r_s_bias"))] == []
    again = type(model).from_pretrained(out, attn_implementation="eager")
    again.config._experts_implementation = "eager"
    torch.testing.assert_close(answer(again.eval(), tokens), answer(model, tokens), rtol=0, atol=1e-6 * scale)
    compare_configs(model.config.to_dict(), again.config.to_dict())


def compare_configs(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Every key that says something of the model is the same."""
    changed = {key: (before[key], after.get(key)) for key in before if before[key] != after.get(key) and key not in FREE}
    assert {key: values for key, values in changed.items() if "drop" not in key} == {}


def test_every_class_is_one_of_theirs() -> None:
    assert [name for architecture in ARCHITECTURES for name in architecture.forms if not hasattr(transformers, name)] == []


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in MODELS.values()}))
def test_values_of_any_type_are_read_or_refused_in_words(kind: str) -> None:
    settings = next(settings for name, settings in MODELS.values() if name == kind)
    content = {**getattr(transformers, kind).config_class(**settings).to_dict(), "architectures": [kind]}
    for key in content:
        for value in ("wide", [1], -1):
            with contextlib.suppress(UserError):
                read_config(Settings({**content, key: value}))
