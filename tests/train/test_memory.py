"""A model whose training state does not fit into a process's memory limit trains on two that share it, and alone with files beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("ranks")

SCRIPT = """
import resource, sys
import torch
import torch.distributed as dist
from pathlib import Path
from teratron.config import Config
from teratron.parallel.mesh import Mesh, mesh_sizes
from teratron.train.device import keep_freed_memory
from teratron.train.engine import Engine

rank, ranks, megabytes, store, offload = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
torch.set_num_threads(1)
config = Config().override({
    "model.layers": 12, "model.hidden": 384, "model.heads": 4, "model.seq_length": 8, "model.vocab_size": 256, "model.dropout": 0.1,
    "train.global_batch": 2, "parallel.shard": "parameters" if ranks > 1 else "none",
    "parallel.offload": offload, "parallel.offload_folder": str(Path(store).parent),
})
if ranks > 1:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks)
mesh = Mesh(mesh_sizes(config.parallel, ranks), rank)
# What is taken so far, libraries and all, and so much more.
taken = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
limit = taken * 1024 + megabytes * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
engine = Engine(config, mesh)
engine.optimizer.initialise(1)
draw = torch.Generator().manual_seed(0)
tokens = torch.randint(256, (2, 8), generator=draw)
batch = {"tokens": tokens, "targets": tokens.roll(-1, 1), "weights": torch.ones(2, 8), "positions": torch.arange(8).expand(2, 8),
         "sample": torch.arange(2)}
batch = {name: tensor[engine.rows(2)] for name, tensor in batch.items()}
for step in range(1, 4):
    tally, norm = engine.step(batch, step=step, number=step, lr=1e-3)
print(repr((tally.loss(), float(norm))))
"""


def run(folder: Path, ranks: int, megabytes: int, offload: str = "none") -> list[subprocess.CompletedProcess[str]]:
    """Train three steps of 21M parameters (330 MB of state) with so much memory for each process."""
    script = folder / "train.py"
    script.write_text(SCRIPT)
    commands = [
        [sys.executable, str(script), str(rank), str(ranks), str(megabytes), str(folder / f"store-{ranks}"), offload]
        for rank in range(ranks)
    ]
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PATH": ""}
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) for command in commands
    ]
    outputs = [child.communicate(timeout=120) for child in children]
    return [
        subprocess.CompletedProcess(command, child.returncode, *output)
        for command, child, output in zip(commands, children, outputs, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory limits of a process are Linux's")
def test_two_processes_train_what_one_cannot_hold(tmp_path: Path) -> None:
    (alone,) = run(tmp_path, 1, 280)
    assert alone.returncode != 0
    assert "memory" in alone.stderr.lower()
    (free,) = run(tmp_path, 1, 4000)
    assert free.returncode == 0, free.stderr
    pair = run(tmp_path, 2, 280)
    assert [done.returncode for done in pair] == [0, 0], pair[0].stderr + pair[1].stderr
    expected, found = eval(free.stdout), [eval(done.stdout) for done in pair]
    assert found[0] == found[1]
    assert found[0] == pytest.approx(expected, rel=1e-5)
    (offloaded,) = run(tmp_path, 1, 280, "disk")
    assert offloaded.returncode == 0, offloaded.stderr
    assert eval(offloaded.stdout) == expected
