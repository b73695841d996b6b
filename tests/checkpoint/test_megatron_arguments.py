"""Launch scripts of Megatron-LM become the configs that presets have, and what has no equivalent is named."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from teratron.checkpoint.megatron.arithmetic import evaluate
from teratron.checkpoint.megatron.launch import Translation, translate_script
from teratron.checkpoint.megatron.shell import split_words, statements
from teratron.cli.main import main
from teratron.config import Config, UserError

GPT_345M = """#!/bin/bash
# one machine, the older style: one long list in quotes
CHECKPOINT_PATH=$1
DATA_PATH=${2:-/data/books_text_document}
GPUS=8
GPT_ARGS="--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 \\
    --max-position-embeddings 1024 --micro-batch-size 1 --global-batch-size 512 --lr 0.00015 --train-iters 300000 \\
    --lr-decay-iters 300000 --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 1e-1 --adam-beta2 0.95 --lr-warmup-fraction .01 \\
    --clip-grad 1.0 --bf16 --attention-dropout 0 --hidden-dropout 0 --no-bias-gelu-fusion --vocab-size 51200"
torchrun --nproc_per_node $GPUS --nnodes 1 pretrain_gpt.py $GPT_ARGS \\
    --data-path $DATA_PATH --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt --split 99,1 \\
    --save $CHECKPOINT_PATH --load $CHECKPOINT_PATH \\
    --log-interval 10 --save-interval 500 --eval-interval 1000 --eval-iters 10
"""
GPT_175B = """
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=8; NODES=192
MODEL=( --num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048 )
TRAIN=(
    --micro-batch-size 1 --global-batch-size 1536  # many
    --train-samples $((95000*1536))
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.02 --clip-grad 1.0 --bf16
    --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-samples $(( 120 * 1536 ))
    --attention-dropout 0.0 --hidden-dropout 0.0
)
PARALLEL=(--tensor-model-parallel-size 8 "--pipeline-model-parallel-size" '16')
TRAIN+=( --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --vocab-size 51200 --no-bias-gelu-fusion )
torchrun --nproc-per-node=$GPUS_PER_NODE --nnodes=${NODES} pretrain_gpt.py "${MODEL[@]}" "${TRAIN[@]}" ${PARALLEL[*]} \\
    --split 99,1 --eval-interval 1000 --eval-iters 10 --save-interval 500 --log-interval 10 > out.log 2>&1
"""
LLAMA3_8B = """
LR="3e-4" MIN_LR=3e-5
ARGS=(
    --use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192
    --position-embedding-type rope --rotary-base 500000 --rotary-percent 1.0 --attention-dropout 0.0 --hidden-dropout 0.0
    --swiglu --init-method-std 0.02 --attention-backend fused --normalization RMSNorm --disable-bias-linear
    --untie-embeddings-and-output-weights --vocab-size 128256
)
[[ -d "$DATA" ]] || echo "no data"
if [ -n "$FP8" ]; then
    ARGS+=(--fp8-format hybrid)
fi
python -m torch.distributed.run --nproc_per_node 8 pretrain_gpt.py ${ARGS[@]} \\
    --micro-batch-size 1 --global-batch-size 512 --train-iters 1000000 --lr ${LR} --min-lr ${MIN_LR} --lr-decay-style cosine \\
    --lr-warmup-iters 2000 --weight-decay 0.1 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16 --cross-entropy-loss-fusion \\
    --split '99,1' --eval-interval 1000 --eval-iters 10 --save-interval 500
"""
BERT_336M = """
BERT_ARGS="--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 512 --max-position-embeddings 512 --vocab-size 30522"
python pretrain_bert.py $BERT_ARGS --micro-batch-size 1 --global-batch-size 1024 --lr 1e-4 --train-iters 2000000 --weight-decay 1e-2 \\
    --lr-warmup-iters 10000 --bf16 --split 99,1 --eval-interval 10000 --eval-iters 10 --save-interval 500 --no-bias-gelu-fusion
"""
T5_220M = """
T5_ARGS=( --encoder-num-layers 12 --decoder-num-layers 12 --hidden-size 768 --num-attention-heads 12 --kv-channels 64
    --ffn-hidden-size 3072 --encoder-seq-length 512 --decoder-seq-length 128 --max-position-embeddings 512 )
torchrun pretrain_t5.py ${T5_ARGS[@]} --micro-batch-size 16 --global-batch-size 128 --lr 0.0001 --train-iters 1000000 \\
    --lr-decay-style linear --min-lr 0.00001 --weight-decay 1e-2 --lr-warmup-fraction .01 --fp16 --vocab-extra-ids 100
"""
MIXTRAL = """
MODEL_ARGS=(
    --disable-bias-linear --seq-length 32768 --max-position-embeddings 32768 --num-layers 32 --hidden-size 4096
    --ffn-hidden-size 14336 --num-attention-heads 32 --attention-dropout 0.0 --hidden-dropout 0.0 --normalization RMSNorm
    --position-embedding-type rope --swiglu --untie-embeddings-and-output-weights --group-query-attention --num-query-groups 8
    --no-masked-softmax-fusion --rotary-base 1000000 --vocab-size 32000
)
MOE_ARGS=( --num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 2e-2
    --moe-grouped-gemm --moe-token-dispatcher-type alltoall --overlap-param-gather --overlap-grad-reduce )
torchrun --nproc_per_node 8 --nnodes 16 pretrain_gpt.py ${MODEL_ARGS[@]} ${MOE_ARGS[@]} --micro-batch-size 1 --global-batch-size 128 \\
    --lr 3e-4 --min-lr 3e-5 --train-iters 500000 --lr-decay-style cosine --lr-warmup-iters 2000 --weight-decay 0.1 --adam-beta2 0.95 \\
    --bf16 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --expert-model-parallel-size 8 --use-distributed-optimizer \\
    --sequence-parallel --split 99,1 --eval-interval 1000 --eval-iters 10 --save-interval 500
"""
PRESETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt-345m": (GPT_345M, "megatron-355m", {"data.train": ("/data/books_text_document",), "data.tokenizer": "gpt2-vocab.json"}),
    "gpt-175b": (GPT_175B, "gpt3-175b", {}),
    "llama3-8b": (LLAMA3_8B, "llama3-8b", {}),
    "bert-336m": (BERT_336M, "megatron-bert-336m", {}),
    "mixtral": (
        MIXTRAL, "mixtral-8x7b",
        {"parallel.tensor": 2, "parallel.pipeline": 4, "parallel.expert": 8, "parallel.shard": "optimizer", "parallel.sequence": True},
    ),
}  # fmt: skip
"""Scripts, the presets that they are, and the keys in which they differ."""


def translated(folder: Path, script: str) -> Translation:
    (folder / "train.sh").write_text(script)
    return translate_script(folder / "train.sh")


@pytest.mark.parametrize("name", PRESETS)
def test_scripts_are_the_presets_of_their_models(tmp_path: Path, name: str) -> None:
    script, preset, keys = PRESETS[name]
    expected = Config.preset(preset).override({"data.order": "megatron" if "pretrain_gpt" in script else "native"} | keys)
    found = translated(tmp_path, script)
    different = {key: (value, dict(expected.items())[key]) for key, value in found.config.items() if value != dict(expected.items())[key]}
    assert different == {}
    (tmp_path / "config.toml").write_text(found.to_toml("config.toml"))
    assert Config.load(tmp_path / "config.toml") == found.config


def test_t5_is_an_encoder_decoder_with_learned_positions(tmp_path: Path) -> None:
    found = dict(translated(tmp_path, T5_220M).config.items())
    expected = {
        "model.family": "encoder_decoder", "model.layers": 12, "model.hidden": 768, "model.position": "learned", "model.seq_length": 512,
        "objective.name": "span_corruption", "optim.warmup_steps": 10000, "train.precision": "fp16", "model.dropout": 0.1,
        "model.activation": "gelu_tanh", "optim.schedule": "linear", "train.global_batch": 128,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected


def test_what_has_no_equivalent_is_named(tmp_path: Path) -> None:
    found = translated(tmp_path, LLAMA3_8B.replace("--swiglu", "--swiglu --frobnicate 3 --exit-interval 10"))
    notes = "\n".join(found.notes)
    assert "--frobnicate: has no equivalent here" in notes
    assert "--exit-interval: stops early: train.stop_after" in notes
    assert "--fp8-format: stands in a condition" in notes
    assert "kernels are chosen by themselves: --attention-backend --cross-entropy-loss-fusion" in notes
    silent = translated(
        tmp_path, "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1 --lr 1 --train-iters 9"
    )
    assert "model.dropout = 0.1 is Megatron-LM's default (--hidden-dropout was not given); here it would be 0.0" in silent.notes


def test_processes_follow_from_the_launcher_or_from_the_degrees(tmp_path: Path) -> None:
    assert translated(tmp_path, LLAMA3_8B).command("c.toml") == "teratron train c.toml --run RUN --nproc 8"
    many = translated(tmp_path, GPT_175B)
    assert (many.processes, many.nodes) == (1536, 192)
    assert many.command("c.toml").startswith("torchrun --nnodes 192 --nproc-per-node 8 -m teratron train c.toml")


MINIMAL = "--num-layers 4 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1 --lr 1e-3 --train-iters 10 "


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        ("--num-experts 4 --disable-bias-linear --normalization RMSNorm --moe-layer-freq ([0]*1+[1]*3)", "model.moe_first_dense", 1),
        (
            "--num-experts 4 --disable-bias-linear --normalization RMSNorm --moe-router-score-function sigmoid",
            "model.normalise_gates",
            True,
        ),
        ("--num-experts 4 --disable-bias-linear --normalization RMSNorm --moe-router-pre-softmax", "model.normalise_gates", False),
        ("--openai-gelu --no-bias-gelu-fusion", "model.activation", "gelu_tanh"),
        ("--window-size 3,0", "model.window", 4),
        ("--rampup-batch-size 2 2 20 --global-batch-size 8", "train.batch_schedule", "2 2 20"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 4 --lr-wsd-decay-style minus_sqrt", "optim.decay_shape", "sqrt"),
        ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1", "parallel.chunks", 2),
        ("--context-parallel-size 2 --cp-comm-type a2a", "parallel.context_method", "all_to_all"),
        ("--start-weight-decay 0.1 --end-weight-decay 0.2 --weight-decay-incr-style cosine", "optim.weight_decay_ramp", "cosine"),
        ("--fp16 --initial-loss-scale 4096", "optim.initial_loss_scale", 4096.0),
        ("--add-qkv-bias --disable-bias-linear --normalization RMSNorm", "model.qkv_bias", True),
        ("--data-path 0.5 a 0.5 b", "data.train", ("0.5", "a", "0.5", "b")),
    ],
)
def test_single_arguments(tmp_path: Path, flags: str, key: str, value: Any) -> None:
    assert dict(translated(tmp_path, MINIMAL + flags.replace("(", "'(").replace(")", ")'")).config.items())[key] == value


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (MINIMAL + "--squared-relu", "--squared-relu = True cannot be expressed here"),
        (MINIMAL + "--disable-bias-linear", "--disable-bias-linear with --normalization LayerNorm"),
        (MINIMAL + "--num-experts 4", "--num-experts with biases"),
        (MINIMAL.replace("--num-layers 4", "--num-layers $LAYERS"), r"--num-layers = \$\{LAYERS\}: the script does not say"),
        (MINIMAL.replace("--num-layers 4", "--num-layers"), "--num-layers"),
        (MINIMAL.replace("--lr 1e-3", ""), "--lr is missing"),
        (MINIMAL.replace("--train-iters 10", ""), "--train-iters is missing"),
        (MINIMAL + "--optimizer sophia", "--optimizer = sophia cannot be expressed here"),
        ("echo nothing\n", "no command with arguments"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path: Path, script: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        translated(tmp_path, script)


SHELL = {
    "quotes": ("""A='x y'; B="$A z"; emit "$A" $A '$A' "\\$A" $B""", None),
    "lists": ("""L=(a "b c" d); L+=(e); emit "${L[@]}" ${L[1]:-no}x ${#L}""", ["a", "b c", "d", "e"]),
    "comments": ("""emit a#b "#c" # d\nN=3 # four\nemit $N""", None),
    "sums": ("""A=3; B=$((A*2 + 1)); emit $((B/2)) "$(( $B % 4 ))" """, None),
    "defaults": ("""emit ${NOWHERE:-x y} "${NOWHERE:-x y}" """, None),
    "continued": ("emit a \\\n  b\\\n  c", None),
}


@pytest.mark.parametrize("name", SHELL)
def test_words_are_those_of_a_shell(tmp_path: Path, name: str) -> None:
    """What bash itself makes of them."""
    from teratron.checkpoint.megatron import shell

    script, expected = SHELL[name]
    if expected is None:
        run = subprocess.run(["bash", "-c", 'emit() { printf "%s\\n" "$@"; }\n' + script], capture_output=True, text=True, check=True)
        expected = run.stdout.splitlines()
    variables: dict[str, list[str]] = {}
    words = [word for statement in statements(script) for word in shell._run(statement, variables) if word != "emit"]
    assert words[: len(expected)] == expected


def test_sums_run_nothing() -> None:
    assert evaluate("([0]*3+[1]*2)*2") == [0, 0, 0, 1, 1] * 2
    for text in ("__import__('os')", "f()", "1 if 1 else 2", "a", "(", "9**9"):
        with pytest.raises(ValueError, match=r"."):
            evaluate(text)
    assert split_words("$((__import__('os')))", {}) != []


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.sh").write_text(BERT_336M)
    assert main(["convert", "args", str(tmp_path / "train.sh"), "--output", str(tmp_path / "c.toml")]) == 0
    assert "start it with: teratron train" in capsys.readouterr().out
    assert Config.load(tmp_path / "c.toml").model.family == "encoder"
    assert main(["convert", "args", str(tmp_path / "train.sh")]) == 0
    assert capsys.readouterr().out.startswith("# teratron train config.toml")
