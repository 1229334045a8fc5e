"""Where training runs: one process, DDP or FSDP2, through Lightning Fabric."""

from __future__ import annotations

import inspect
import logging
from typing import Any, Literal

import torch
from torch import nn

Strategy = Literal["auto", "ddp", "fsdp"]
Precision = Literal["fp32", "bf16"]


def make_fabric(
    *, devices: int, nodes: int, strategy: Strategy, precision: Precision, accelerator: Literal["auto", "cpu", "gpu"]
) -> Any:
    """A launched `Fabric`. With several devices it starts the other processes (or joins torchrun's or SLURM's).

    Raises:
        ValueError: for an unknown strategy, or more devices than there are.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    if devices < 1 or nodes < 1:
        raise ValueError(f"devices, nodes: must be at least 1, got {devices} and {nodes}")
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    if accelerator == "gpu" and devices > torch.cuda.device_count():
        raise ValueError(f"devices: {devices} asked, this machine has {torch.cuda.device_count()} GPUs")
    several = devices * nodes > 1
    chosen: Any = "auto"
    if strategy == "fsdp":
        # Left to themselves the sizes are (nodes, devices): the devices of a node would be tensor-parallel, not sharded.
        chosen = ModelParallelStrategy(_fully_shard, data_parallel_size=devices * nodes, tensor_parallel_size=1)
    elif strategy == "ddp" or (strategy == "auto" and several):
        chosen = DDPStrategy(**_own_buffers())
    elif strategy != "auto":
        raise ValueError(f"strategy: must be auto, ddp or fsdp, got {strategy!r}")
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=chosen,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
    )
    fabric.launch()
    return fabric


def _own_buffers() -> dict[str, Any]:
    """Buffers stay each process's own: broadcasting them writes in place between two forwards of one backward."""
    options = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"  # its older name
    return {name: False}


def _fully_shard(module: nn.Module, device_mesh: Any) -> nn.Module:
    """FSDP2: shard each block of a list of blocks, then the rest.

    The rest, too, is sharded again after a forward: one without a backward (a preview, a validation) must not leave
    whole parameters behind where the optimiser, the average and the checkpoint expect shards.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.nn.utils.parametrize import ParametrizationList

    mesh = device_mesh["data_parallel"] if "data_parallel" in (device_mesh.mesh_dim_names or ()) else device_mesh
    # From the innermost lists outwards, as nested shards want it; additions to a weight are sharded with their layer.
    for part in reversed(list(module.modules())):
        if isinstance(part, (nn.ModuleList, nn.Sequential)) and not isinstance(part, ParametrizationList):
            for block in part:
                if not isinstance(block, (nn.ModuleList, nn.Sequential)) and any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module


@torch.no_grad()
def same_everywhere(module: nn.Module, world: int) -> None:
    """Give every process the first one's parameters and buffers."""
    if world > 1:
        import torch.distributed as dist

        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, src=0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
