"""Where the time of a step goes: every moment counts once, under what is on top, on CPU, on a GPU and across ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teratron.cli.main import main
from teratron.config import UserError
from teratron.parallel.spans import DATA, STARVED, STEP, UPDATE, WAIT
from teratron.train.breakdown import KINDS, Event, breakdown, kernel_kind, operation_kind, painted

TINY = ["--model.layers", "2", "--model.hidden", "32", "--model.heads", "2", "--model.seq_length", "16", "--model.vocab_size", "64"]
TINY += ["--train.global_batch", "4", "--train.micro_batch", "2", "--device", "cpu", "--steps", "2"]

moments = st.floats(0, 100)
events = st.builds(lambda a, b, kind: Event(min(a, b), max(a, b), kind), moments, moments, st.sampled_from([*KINDS]))


@given(st.lists(events, max_size=20))
def test_kinds_add_up_to_the_window(found: list[Event]) -> None:
    assert sum(painted((20.0, 70.0), found).values()) == pytest.approx(50.0)


@given(st.lists(events, max_size=20))
def test_what_comes_last_lies_on_top(found: list[Event]) -> None:
    top = Event(30.0, 40.0, "attention")
    assert painted((30.0, 40.0), [*found, top])["attention"] == pytest.approx(10.0)


def write(path: Path, *rows: tuple[Any, ...]) -> Path:
    """A trace of (category, name, start, end[, correlation])."""
    keys = [
        {
            "ph": "X",
            "cat": cat,
            "name": name,
            "ts": start,
            "dur": end - start,
            "tid": 7 if cat == "kernel" else 1,
            "args": {"correlation": c},
        }
        for cat, name, start, end, c in ((*row, None)[:5] for row in rows)
    ]
    path.write_text(json.dumps({"traceEvents": [{"ph": "M", "name": "process_name"}, *keys]}))
    return path


def nonzero(kinds: dict[str, float]) -> dict[str, float]:
    """Microseconds of the kinds that take any."""
    return {kind: pytest.approx(time * 1000) for kind, time in kinds.items() if time}


def test_on_cpu_the_innermost_operation_counts(tmp_path: Path) -> None:
    trace = write(
        tmp_path / "trace.json",
        ("user_annotation", STEP, 0, 100),
        ("user_annotation", DATA, 0, 10),
        ("cpu_op", "aten::cat", 2, 8),
        ("cpu_op", "aten::linear", 10, 30),
        ("cpu_op", "aten::view", 12, 14),
        ("cpu_op", "aten::addmm", 15, 30),
        ("cpu_op", "aten::scaled_dot_product_attention", 30, 40),
        ("cpu_op", "aten::mul", 32, 34),
        ("cpu_op", "autograd::engine::evaluate_function: MulBackward0", 40, 50),
        ("cpu_op", "aten::mul", 42, 50),
        ("user_annotation", UPDATE, 60, 80),
        ("cpu_op", "aten::_fused_adamw_", 62, 70),
        ("user_annotation", WAIT, 72, 75),
        ("user_annotation", STARVED, 90, 95),
    )
    assert nonzero(breakdown(trace)) == {
        "products": 18, "attention": 10, "elementwise": 8, "optimizer": 17, "communication": 3, DATA: 10, "host": 29, "idle": 5
    }  # fmt: skip


def test_on_a_gpu_messages_beside_kernels_are_free_and_gaps_are_the_hosts(tmp_path: Path) -> None:
    trace = write(
        tmp_path / "trace.json",
        ("user_annotation", STEP, 0, 100),
        ("user_annotation", DATA, 0, 10),
        ("user_annotation", UPDATE, 50, 60),
        ("cuda_runtime", "cudaLaunchKernel", 52, 53, 5),
        ("kernel", "sm90_xmma_gemm_bf16bf16", 20, 40, 1),
        ("kernel", "ncclDevKernel_AllReduce_Sum", 30, 50, 2),
        ("kernel", "flash_fwd_kernel", 50, 60, 3),
        ("kernel", "vectorized_elementwise_kernel", 60, 65, 4),
        ("kernel", "vectorized_elementwise_kernel", 70, 80, 5),
    )
    assert nonzero(breakdown(trace)) == {
        DATA: 10, "products": 20, "communication": 10, "attention": 10, "elementwise": 5, "optimizer": 10, "host": 35
    }  # fmt: skip


def test_several_steps_are_their_mean(tmp_path: Path) -> None:
    steps = [("user_annotation", STEP, 0, 10), ("user_annotation", STEP, 20, 40)]
    steps += [("cpu_op", "aten::mm", 4, 10), ("cpu_op", "aten::mm", 20, 24)]
    found = write(tmp_path / "trace.json", *steps)
    assert nonzero(breakdown(found)) == {"products": 5, "host": 10}


def test_a_trace_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no step"):
        breakdown(write(tmp_path / "trace.json", ("cpu_op", "aten::mm", 0, 1)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::bmm", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_scaled_mm", "products"),
        ("aten::_grouped_mm", "products"),
        ("aten::transpose", "host"),
        ("aten::native_layer_norm", "elementwise"),
        ("c10d::allreduce_", "communication"),
        ("Torch-Compiled Region: 0/0", "elementwise"),
        ("MmBackward0", "host"),
    ],
)
def test_operations_have_a_kind(name: str, kind: str) -> None:
    assert operation_kind(name) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT", "products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16", "communication"),
        ("triton_poi_fused_gelu_0", "elementwise"),
        ("Memcpy HtoD (Pageable -> Device)", "elementwise"),
    ],
)
def test_kernels_have_a_kind(name: str, kind: str) -> None:
    assert kernel_kind(name) == kind


def test_a_profile_adds_up_to_its_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "profile", *TINY, "--json", str(tmp_path / "found.json"), "--trace", str(tmp_path / "traces")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    (kinds,) = found["ranks"]
    trace = json.loads((tmp_path / "traces" / "rank-0.json").read_text())
    steps = [event["dur"] for event in trace["traceEvents"] if event["name"] == STEP]
    assert sum(kinds.values()) == pytest.approx(sum(steps) / len(steps) / 1000)
    assert all(kinds[kind] > 0 for kind in ("products", "attention", "elementwise", "optimizer", DATA, "host"))
    assert kinds["communication"] == kinds["idle"] == 0
    assert found["bound"].keys() == {"products", "attention", "elementwise", "optimizer"}
    told = capsys.readouterr().out
    assert f"{found['tokens_per_second']:,.0f} tokens/s" in told
    assert all(name in told for kind, name in KINDS.items() if kinds[kind])


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_every_rank_of_a_profile_adds_up(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    assert main(["bench", "profile", *TINY, "--parallel.pipeline", "2", "--nproc", "2", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert len(found["ranks"]) == 2
    assert all(rank["idle"] > 0 for rank in found["ranks"])
    assert found["bound"]["communication"] > 0


def test_a_trace_folder_is_for_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", *TINY, "--trace", "here"]) == 2
    assert "--trace" in capsys.readouterr().err
