"""Adapters merged, in PEFT's format, and as new parts of a run compute what they compute beside the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from teratron.checkpoint import open_weights, weights_for, write_weights
from teratron.checkpoint.adapters import base_of, merged
from teratron.checkpoint.peft import CONFIG, TENSORS, with_adapter, write_peft
from teratron.checkpoint.probe import logits_of, tokens_for
from teratron.checkpoint.source import Weights
from teratron.checkpoint.stream import Entry
from teratron.cli.main import main
from teratron.config import ModelConfig, UserError
from teratron.models import build_model, initialise, parts_of
from teratron.models.adapters import SUFFIXES

SHARED = Path(__file__).parents[3] / "shared" / "data" / "ckpt_lora_adapter"
TINY: dict[str, Any] = {"layers": 2, "hidden": 16, "heads": 4, "seq_length": 16, "vocab_size": 23, "init_std": 0.3, "ffn": 24}
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False, "tie_embeddings": False, "kv_heads": 2}
GPT2 = {"activation": "gelu_tanh"}
NEOX = {"position": "rope", "block": "parallel", "tie_embeddings": False, "rope_share": 0.5}
BERT = {"family": "encoder", "norm_place": "post", "token_types": 2, "embedding_norm": True, "head": "classes", "classes": 3}
T5 = {
    "family": "encoder_decoder", "norm": "rmsnorm", "position": "relative", "bias": False, "activation": "geglu_tanh",
    "scale_attention": False, "tie_embeddings": False, "relative_buckets": 8, "relative_distance": 16,
}  # fmt: skip
DORA = {"adapter_dora": True}
FEW = {"adapter_targets": ("q", "v", "output")}
MODELS = {
    "llama": LLAMA,
    "llama-dora-q-v": LLAMA | DORA | FEW,
    "gpt2": GPT2,
    "gpt2-dora-q-v": GPT2 | DORA | FEW,
    "neox": NEOX,
    "bert": BERT,
    "t5": T5 | DORA,
}
FIRST = ("llama-dora-q-v", "gpt2")


def adapted(keys: dict[str, Any]) -> Weights:
    """A model with adapters that do something, in float64."""
    config = ModelConfig(**(TINY | {"adapter_rank": 3, "adapter_alpha": 6.0} | keys))
    model = build_model(config, dtype=torch.float64)
    initialise(model, 1)
    draw = torch.Generator().manual_seed(2)
    parameters = dict(model.named_parameters())

    def entries() -> Iterator[Entry]:
        for part in parts_of(model):
            values = part.of(parameters[part.parameter]).detach()
            if part.name.endswith((".lora_b", ".magnitude")):
                values += 0.2 * torch.rand(values.shape, generator=draw, dtype=torch.float64)
            yield Entry(part.name, values.dtype, part.shape, values.clone)

    return Weights(config, list(entries()), None, "model")


def tensors(weights: Weights) -> dict[str, Tensor]:
    return {entry.name: entry.values() for entry in weights.parts}


@pytest.mark.parametrize("name", [*FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name not in FIRST)])
def test_merged_weights_and_pefts_folder_compute_what_adapters_do(name: str, tmp_path: Path) -> None:
    weights = adapted(MODELS[name])
    plain, tokens = merged(weights), tokens_for(weights)
    expected = logits_of(weights, tokens)
    assert (expected - logits_of(base_of(weights), tokens)).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(plain, tokens), expected, rtol=0, atol=1e-12)

    write_peft(weights, tmp_path / "peft")
    found = with_adapter(base_of(weights), tmp_path / "peft")
    assert {part: value.shape for part, value in tensors(found).items()} == {part: value.shape for part, value in tensors(plain).items()}
    for part, value in tensors(plain).items():
        torch.testing.assert_close(tensors(found)[part], value, rtol=0, atol=1e-12, msg=part)


@pytest.mark.parametrize("name", [*FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in ("neox", "bert", "t5"))])
def test_peft_computes_the_same_from_an_export(name: str, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from teratron.checkpoint.huggingface import write_huggingface

    weights = adapted(MODELS[name])
    base = base_of(weights).cast(torch.float32)
    write_huggingface(base, tmp_path / "base", 10**9)
    write_peft(weights, tmp_path / "peft")
    (kind,) = json.loads((tmp_path / "base" / "config.json").read_text())["architectures"]
    model = getattr(transformers, kind).from_pretrained(tmp_path / "base").double()
    model = peft.PeftModel.from_pretrained(model, tmp_path / "peft").double().eval()
    tokens = tokens_for(weights)
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if name == "t5" else {})
    with torch.no_grad():
        found = model(**inputs).logits
    torch.testing.assert_close(found, logits_of(weights, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [False, True])
def test_adapters_appear_when_they_give_the_models_logits(wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of half types, where a fused layer has magnitudes for what is not adapted."""
    weights = adapted(MODELS["gpt2-dora-q-v"]).cast(torch.bfloat16)
    if wrong:
        monkeypatch.setattr("teratron.checkpoint.peft._scale", lambda *_: 1.0)
        with pytest.raises(UserError, match="not what was read: logits differ by"):
            write_peft(weights, tmp_path / "peft")
    else:
        assert "logits of 16 tokens differ by at most" in write_peft(weights, tmp_path / "peft")
    assert (tmp_path / "peft").exists() is not wrong


def test_a_folder_from_elsewhere_is_merged_onto_its_base() -> None:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED.name} is not here")
    stored = load_file(SHARED / TENSORS)
    rows = stored["base_model.model.lm_head.weight"].shape[0]
    shape = LLAMA | {"hidden": 64, "heads": 16, "kv_heads": 0, "ffn": 32, "vocab_size": rows, "adapter_rank": 0}
    base = adapted(shape)
    found, before = tensors(with_adapter(base, SHARED)), tensors(base)
    a, b = (stored[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{kind}.weight"].double() for kind in "AB")
    assert b.abs().max() > 0
    torch.testing.assert_close(
        found["blocks.0.attention.q.weight"], before["blocks.0.attention.q.weight"] + 32 / 8 * b @ a, rtol=0, atol=1e-12
    )
    assert torch.equal(found["embedding.tokens.weight"], stored["base_model.model.model.embed_tokens.weight"])
    assert torch.equal(found["blocks.1.attention.q.weight"], before["blocks.1.attention.q.weight"])
    with pytest.raises(UserError, match=r"lm_head.weight has shape \[5, 64\], the model needs \[23, 64\]"):
        with_adapter(adapted(shape | {"vocab_size": 23}), SHARED)


def test_a_folder_from_elsewhere_computes_what_it_does_in_peft(tmp_path: Path) -> None:
    """Of its base, which is not here, the shape, with drawn weights."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from teratron.checkpoint.huggingface import write_huggingface

    if not SHARED.is_dir():
        pytest.skip(f"{SHARED.name} is not here")
    rows = load_file(SHARED / TENSORS)["base_model.model.lm_head.weight"].shape[0]
    shape = {"layers": 8, "hidden": 64, "heads": 16, "kv_heads": 0, "ffn": 256, "vocab_size": rows, "adapter_rank": 0}
    base = adapted(LLAMA | shape).cast(torch.float32)
    write_huggingface(base, tmp_path / "base", 10**9)
    tokens = torch.arange(16)[None] % rows
    with torch.no_grad():
        plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
        before = plain(tokens).logits
        expected = peft.PeftModel.from_pretrained(plain, SHARED).eval()(tokens).logits
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(with_adapter(base, SHARED), tokens), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, '"IA3" is not supported, expected "LORA"'),
        ({"bias": "all"}, "'bias' = \"all\" is not supported"),
        ("q_proj.lora_B", "holds no layers.0.self_attn.q_proj.lora_B.weight beside its partner"),
        ("rename", "lora_A.weight has no place in LlamaForCausalLM as model is: give the base that it was made for"),
    ],
)
def test_what_of_peft_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    weights, folder = adapted(LLAMA | {"layers": 1}), tmp_path / "peft"
    write_peft(weights, folder)
    if isinstance(change, dict):
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | change))
    else:
        stored = load_file(folder / TENSORS)
        kept = {name: value for name, value in stored.items() if change not in name}
        save_file(
            {name.replace("layers.0", "layers.9") if change == "rename" else name: value for name, value in kept.items()}, folder / TENSORS
        )
    with pytest.raises(UserError, match=re.escape(message)):
        with_adapter(base_of(weights), folder)
    with pytest.raises(UserError, match=r"has no adapters, model.adapter_rank = 0"):
        write_peft(base_of(weights), tmp_path / "other")


def test_a_run_says_what_is_new_and_leaves_a_head_behind(tmp_path: Path) -> None:
    file = tmp_path / "base.safetensors"
    language = adapted({"head_transform": True, "pooler": True, "family": "encoder", "adapter_rank": 0})
    write_weights(language, file)
    classes = replace(language.config, head="classes", classes=3, pooler=False, head_transform=False, adapter_rank=2)
    given, new = weights_for(file, classes)
    assert {name for name in new if not name.endswith(SUFFIXES)} == {"head.classes.weight", "head.classes.bias"}
    assert {name for name in tensors(language) if name not in given} == {name for name in tensors(language) if name.startswith("head.")} - {
        "head.norm.weight",
        "head.norm.bias",
    }
    assert not weights_for(file, language.config)[1]
    with pytest.raises(UserError, match=r"its weights have model.layers = 2, the run 3: set --model.layers 2"):
        weights_for(file, replace(classes, layers=3))
    write_weights(base_of(adapted({"family": "encoder"})), file, overwrite=True)
    with pytest.raises(UserError, match=r"weights missing: head.pooler.weight"):
        weights_for(file, replace(classes, pooler=True))


def test_other_adapters_are_merged_before_a_run_draws_its_own(tmp_path: Path) -> None:
    weights = adapted(DORA)
    write_weights(weights, tmp_path / "adapted.safetensors")
    given, new = weights_for(tmp_path / "adapted.safetensors", replace(weights.config, adapter_rank=2))
    assert new
    assert all(name.endswith(SUFFIXES) for name in new)
    torch.testing.assert_close({name: entry.values() for name, entry in given.items()}, tensors(merged(weights)), rtol=0, atol=1e-12)
    assert weights_for(tmp_path / "adapted.safetensors", weights.config)[1] == ()


def test_convert_writes_adapters_and_merges_them(tmp_path: Path) -> None:
    weights = adapted(LLAMA | DORA | {"layers": 1})
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("adapted", "base", "merged", "found")}
    write_weights(weights, Path(files["adapted"]))
    write_weights(base_of(weights), Path(files["base"]))
    assert main(["convert", files["adapted"], str(tmp_path / "peft"), "--to", "peft"]) == 0
    assert main(["convert", files["base"], files["found"], "--adapter", str(tmp_path / "peft")]) == 0
    assert main(["convert", files["adapted"], files["merged"]]) == 0
    for name in ("found", "merged"):
        torch.testing.assert_close(tensors(open_weights(Path(files[name]))), tensors(merged(weights)), rtol=0, atol=1e-12)
