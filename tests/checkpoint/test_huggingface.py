"""Hugging Face import: a real trained Llama, sharded and bare files, and a clear refusal of everything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import read_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from teratron.checkpoint import open_weights
from teratron.checkpoint.huggingface import is_huggingface
from teratron.checkpoint.probe import logits_of
from teratron.config import UserError

transformers = pytest.importorskip("transformers", reason="transformers writes the folders: pip install transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny untied GPT-2 and Llama as `save_pretrained` writes them, in one file each."""
    gpt2 = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=8, vocab_size=30, tie_word_embeddings=False)
    llama = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=8, vocab_size=30,
    )  # fmt: skip
    root = tmp_path_factory.mktemp("huggingface")
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2")
    transformers.LlamaForCausalLM(llama).save_pretrained(root / "llama")
    return {"gpt2": root / "gpt2", "llama": root / "llama"}


def changed(source: Path, target: Path, settings: dict[str, Any], tensors: Callable[[dict[str, Tensor]], object] | None = None) -> Path:
    """A copy of a folder with changes of `config.json` (None = without the key) and of the tensors."""
    shutil.copytree(source, target)
    content = {**json.loads((target / "config.json").read_text()), **settings}
    (target / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    if tensors is not None:
        stored = load_file(target / "model.safetensors")
        tensors(stored)
        save_file(stored, target / "model.safetensors")
    return target


def test_a_real_llama_gives_its_golden_logits_and_loss(shared: Path) -> None:
    folder = shared / "data/ckpt_stories260k/hf_converted"
    golden = json.loads((folder / "golden_reference.json").read_text())
    tokens = torch.tensor([golden["prompt_ids"]])
    logits = logits_of(open_weights(folder).cast(torch.float64), tokens)[0]
    expected = torch.tensor(golden["last_position_logits"], dtype=torch.float64)
    assert float((logits[-1] - expected).abs().max()) < 1e-6  # the file has 6 decimals
    assert float(F.cross_entropy(logits[:-1], tokens[0, 1:])) == pytest.approx(golden["mean_nll_per_token"], abs=1e-12)
    single = logits_of(open_weights(folder), tokens)[0, -1].double()
    assert float((single - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_a_real_llama_tells_its_golden_story(shared: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = shared / "data/ckpt_stories260k"
    golden = json.loads((folder / "hf_converted/golden_reference.json").read_text())
    story = golden["greedy_ids_from_bos"]
    choices = logits_of(open_weights(folder / "hf_converted"), torch.tensor([story]))[0].argmax(-1).tolist()
    assert choices[:-1] == story[1:]  # each token is the greedy choice after those before it: by induction, the greedy text
    text = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tok512.model")).decode([story[0], *choices[:-1]])
    assert text == golden["greedy_text"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sharded_and_bare_files_and_buffers_give_the_same_parts(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    config, expected = read_weights(folders[family])
    (prefix, buffer) = {"gpt2": ("transformer.", "h.0.attn.bias"), "llama": ("model.", "layers.0.self_attn.rotary_emb.inv_freq")}[family]

    def bare(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)
        tensors[buffer] = torch.ones(4)

    without = changed(folders[family], tmp_path / "bare", {}, bare)
    shards = tmp_path / "shards"
    model_class = {"gpt2": transformers.GPT2LMHeadModel, "llama": transformers.LlamaForCausalLM}[family]
    model_class.from_pretrained(folders[family]).save_pretrained(shards, max_shard_size="5KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    for folder in (without, shards):
        found_config, found = read_weights(folder)
        assert found_config == config
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_stored_copy_of_a_tied_head_and_a_missing_architecture_name_are_tolerated(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders["gpt2"], tmp_path / "tied", {"tie_word_embeddings": True, "architectures": None})
    config, tensors = read_weights(folder)
    assert config.tie_embeddings
    assert "head.output.weight" not in tensors


def test_half_precision_weights_keep_their_type(folders: dict[str, Path], tmp_path: Path) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    _, tensors = read_weights(changed(folders["llama"], tmp_path / "half", {}, halve))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_older_files_keep_the_rotary_base_beside_the_rest(folders: dict[str, Path], tmp_path: Path) -> None:
    old = {"rope_parameters": None, "rope_theta": 12345.0, "rope_scaling": {"type": "default"}}
    assert read_weights(changed(folders["llama"], tmp_path / "old", old))[0].rope_theta == 12345.0


SETTINGS = [
    ("llama", {"architectures": ["FalconForCausalLM"]}, "architecture 'FalconForCausalLM' is not supported; supported: Llama.*, GPT2LM"),
    ("llama", {"architectures": None, "model_type": "falcon"}, "architecture 'falcon' is not supported"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "'rope_scaling' = .*dynamic.* is not supported"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7}}, "'rope_scaling' = .*mscale.* is not supported"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "model.rope_scaling = llama3 needs model.rope_original"),
    ("llama", {"rope_scaling": "linear"}, "'rope_scaling' = \"linear\" is not supported"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "'rope_parameters' = .* is not supported"),
    ("llama", {"mlp_bias": True}, "'mlp_bias' = true is not supported, expected false"),
    ("llama", {"hidden_act": "relu"}, r"'hidden_act' = \"relu\" is not supported, expected silu\|gelu"),
    ("llama", {"quantization_config": {"bits": 4}}, "'quantization_config' = .* is not supported, expected null"),
    ("llama", {"hidden_size": None}, "'hidden_size' is missing"),
    ("llama", {"hidden_size": "wide"}, "model.hidden = 'wide': expected integer"),
    ("llama", {"num_attention_heads": 3, "num_key_value_heads": 2}, "model.heads = 3 is not divisible"),
    ("gpt2", {"scale_attn_weights": False}, "'scale_attn_weights' = false is not supported, expected true"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' = true"),
    ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' = true"),
    ("gpt2", {"activation_function": "silu"}, "'activation_function' = \"silu\" is not supported, expected gelu.gelu_new"),
]


@pytest.mark.parametrize(("family", "settings", "message"), SETTINGS)
def test_what_the_model_lacks_is_refused(
    family: str, settings: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    refuse(changed(folders[family], tmp_path / "model", settings), rf"config\.json: {message}")


def refuse(folder: Path, message: str) -> None:
    """The import raises one line that names the file or folder and matches."""
    with pytest.raises(UserError, match=message) as refused:
        read_weights(folder)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)


NAME = "transformer.h.1.attn.c_attn.weight"
TENSORS = [
    (lambda tensors: tensors.pop(NAME), "h.1.attn.c_attn.weight is missing from the weights"),
    (lambda tensors: tensors.pop("lm_head.weight"), "lm_head.weight is missing"),
    (lambda tensors: tensors.update({NAME: tensors[NAME].t().contiguous()}), r"has shape \[48, 16\], expected \[16, 48\]"),
    (lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.int8)}), "holds numbers of type I8, expected F32"),
    (lambda tensors: tensors.update({"transformer.adapter": torch.ones(2)}), "the weights hold adapter, which config.json does not"),
]


@pytest.mark.parametrize(("change", "message"), TENSORS)
def test_other_tensors_are_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    refuse(changed(folders["gpt2"], tmp_path / "model", {}, change), message)


def test_unreadable_files_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders["gpt2"], tmp_path / "model", {})
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    refuse(folder, "not a readable safetensors file")
    (folder / "model.safetensors").unlink()
    refuse(folder, "no model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refuse(folder, "pytorch_model.bin: ")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    refuse(folder, r"names model-1\.safetensors, which is not in the folder \(1 of 1 missing\)")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model/config.json"}}))
    refuse(folder, "which is not in the folder")
    (folder / "model.safetensors.index.json").write_text("{}")
    refuse(folder, "'weight_map' = None")
    (folder / "config.json").write_text("[1]")
    refuse(folder, "found a JSON list, expected an object")
    (folder / "config.json").write_text("{")
    refuse(folder, "not a readable JSON file")


@pytest.mark.parametrize("name", ["BloomForCausalLM", "BertForSequenceClassification", "T5ForConditionalGeneration"])
def test_folders_of_pickles_give_the_logits_of_transformers(name: str, shared: Path) -> None:
    folder = shared / "data/ckpt_tiny_hf" / name
    assert is_huggingface(folder)
    model = getattr(transformers, name).from_pretrained(folder).eval()
    weights, tokens = open_weights(folder), torch.tensor([[5, 9, 300, 7, 401, 12, 3]])
    with torch.inference_mode():
        expected = model(tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})).logits
    found = logits_of(weights, tokens)[:, : expected.shape[1] if expected.dim() == 3 else 1].view_as(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert weights.tokenizer is not None
    assert not is_huggingface(shared / "data/ckpt_tiny_hf")
