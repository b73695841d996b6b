"""Our own pipeline of two ranks on the oracle's weights and batch: `python pipeline_worker.py FOLDER`, see `megatron_worker.py`.

FOLDER/pipelines.json maps a case to its model (fields of ModelConfig), schedule and inputs. Each case's loss and gradient norm become
FOLDER/CASE.safetensors.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from teratron.config import Config
from teratron.parallel.mesh import Mesh
from teratron.train.engine import Engine


def main() -> None:
    folder = Path(sys.argv[1])
    torch.multiprocessing.start_processes(run_rank, (folder,), nprocs=2, start_method="fork")


def run_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/pipelines", timedelta(seconds=60), 2, rank)
    for name, case in json.loads((folder / "pipelines.json").read_text("utf-8")).items():
        inputs = load_file(folder / case["inputs"])
        batch = {key.removeprefix("batch."): tensor for key, tensor in inputs.items() if key.startswith("batch.")}
        model = {f"model.{field}": value for field, value in case["model"].items()}
        keys = {"train.precision": "fp64", "train.global_batch": len(batch["tokens"]), "train.micro_batch": 1}
        config = Config().override({**model, **keys, "parallel.pipeline": 2, "parallel.schedule": case["schedule"]})
        found = step(Engine(config, Mesh({"pipeline": 2}, rank)), inputs, batch)
        if rank == 0:
            save_file(found, folder / f"{name}.safetensors")
    dist.destroy_process_group()


def step(engine: Engine, inputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss and gradient norm of the first step."""
    engine.optimizer.initialise(0)
    for piece in engine.optimizer.pieces():
        if piece.name.startswith("weight/"):
            (box,) = piece.boxes
            piece.values.copy_(inputs[piece.name.removeprefix("weight/")][box.slices()].flatten())
    engine.flat.publish()
    tally, norm = engine.step(batch | {"sample": torch.arange(len(batch["tokens"]))}, step=1, number=1, lr=0.0)
    return {"loss": torch.tensor(tally.loss(), dtype=torch.float64), "norm": torch.as_tensor(norm, dtype=torch.float64)}


if __name__ == "__main__":
    main()
