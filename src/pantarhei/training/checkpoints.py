"""Checkpoints: safetensors for every tensor, JSON for the rest; whole or not there.

A checkpoint is a folder `<iteration>/` with `model.safetensors` (trained networks and averages), `optimizer.safetensors`,
`random.<rank>.safetensors` and `state.json`. It is written under a temporary name, synced and renamed. What an average
shares with its network is written once, and `state.json` says under which name.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pantarhei.files import is_leftover, read_json, read_tensors, sync_folder, write_json, write_tensors
from pantarhei.training.averages import Average
from pantarhei.training.task import Task, unwrapped

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def saved_networks(task: Task) -> dict[str, nn.Module]:
    """What a checkpoint holds: the trained networks and the averages, by path."""
    paths = [path for group in task.groups.values() for path in group.paths]
    return {path: unwrapped(task.get_submodule(path)) for path in [*paths, *task.averages]}


def save(
    folder: Path,
    iteration: int,
    task: Task,
    optimizers: Mapping[str, torch.optim.Optimizer],
    generators: Mapping[str, torch.Generator],
    *,
    extra: Mapping[str, Any],
    rank: int = 0,
    barrier: Callable[[], None] = lambda: None,
) -> Path:
    """Write checkpoint `iteration` into `folder`. All processes call it; the first one writes what is common.

    Raises:
        OSError: the disk is full; older checkpoints stay, and nothing half-written is left.
    """
    final, temporary = folder / f"{iteration:08d}", folder / f".{iteration:08d}.tmp"
    shared = _shared(task)
    tensors = _network_tensors(task, shared)  # gathering sharded parameters needs every process
    moments, settings = _optimizer_state(task, optimizers)
    try:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier()
        write_tensors(temporary / f"random.{rank}.safetensors", _random_state(generators))
        if rank == 0:
            write_tensors(temporary / MODEL, tensors)
            write_tensors(temporary / OPTIMIZER, moments)
            averages = {path: _average(task, path).updates for path in task.averages}
            state = {
                "iteration": iteration,
                "optimizers": settings,
                "averages": averages,
                **({"shared": shared} if shared else {}),
                "task": task.extra_state(),
                "python_random": _python_random(),
                **extra,
            }
            write_json(temporary / STATE, state)
        barrier()
        if rank == 0:
            sync_folder(temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            sync_folder(folder)
        barrier()
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load(
    checkpoint: Path,
    task: Task,
    optimizers: Mapping[str, torch.optim.Optimizer],
    generators: Mapping[str, torch.Generator],
    *,
    rank: int = 0,
) -> dict[str, Any]:
    """Bring task, optimisers and random states back; returns the rest of the state.

    Raises:
        ValueError: a file is truncated or does not fit the task.
    """
    state: dict[str, Any] = read_json(checkpoint / STATE)
    load_networks(checkpoint, task)
    _load_optimizers(task, optimizers, read_tensors(checkpoint / OPTIMIZER), state["optimizers"])
    for path, updates in state["averages"].items():
        _average(task, path).updates = updates
    task.load_extra_state(state["task"])
    random_file = checkpoint / f"random.{rank}.safetensors"
    if random_file.is_file():  # a run that goes on with more processes has no state for the new ones
        _restore_random(read_tensors(random_file), generators)
        _restore_python_random(state["python_random"])
    return state


def load_networks(checkpoint: Path, task: Task) -> None:
    """Bring only the networks and averages back."""
    tensors = network_tensors(checkpoint)
    for path, network in saved_networks(task).items():
        own = {k[len(path) + 1 :]: v for k, v in tensors.items() if k.startswith(path + ".")}
        load_into(network, own, f"{checkpoint / MODEL}: {path}")


def network_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of networks and averages, by path; shared ones under both of their names.

    Raises:
        ValueError: a file is truncated or damaged.
    """
    tensors = read_tensors(checkpoint / MODEL)
    shared: dict[str, str] = read_json(checkpoint / STATE).get("shared", {})
    return tensors | {name: tensors[own] for name, own in shared.items() if own in tensors}


@torch.no_grad()
def load_into(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a network's parameters and buffers, sharded or not.

    Raises:
        ValueError: names or shapes differ; the message names the first that does.
    """
    own = network.state_dict()
    for name in [*own, *tensors]:
        if name not in tensors or name not in own:
            raise ValueError(f"{where}: {name} is {'missing' if name not in tensors else 'not part of the network'}")
    for name, value in own.items():
        if tuple(value.shape) != tuple(tensors[name].shape):
            raise ValueError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}, the network {tuple(value.shape)}"
            )
        value.copy_(_like(tensors[name].to(value.device, value.dtype), value))


def newest(folder: Path) -> Path | None:
    """The last complete checkpoint of a folder, or None."""
    found = sorted(p for p in folder.glob("[0-9]*") if (p / STATE).is_file())
    return found[-1] if found else None


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Remove all but the last `keep` checkpoints and the best one, and what killed processes left half-written."""
    for path in filter(is_leftover, list(folder.iterdir())):
        shutil.rmtree(path, ignore_errors=True)
    complete = sorted(p for p in folder.glob("[0-9]*") if p.is_dir())
    for path in complete[: max(0, len(complete) - keep)]:
        if best is None or path.name != f"{best:08d}":
            shutil.rmtree(path, ignore_errors=True)


def _average(task: Task, path: str) -> Average:
    module = unwrapped(task.get_submodule(path))
    assert isinstance(module, Average)
    return module


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(full: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor as `like` is sharded."""
    mesh, placements = getattr(like, "device_mesh", None), getattr(like, "placements", None)
    if mesh is None:
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, mesh, placements)


def _shared(task: Task) -> dict[str, str]:
    """Of what averages share with the trained networks that they follow: its names there, and those it is written under."""
    trained = [f"{path}." for group in task.groups.values() for path in group.paths]
    return {
        f"{path}.{name}": f"{followed}.{own}"
        for path, followed in task.averages.items()
        if any(f"{followed}.".startswith(prefix) for prefix in trained)
        for name, own in _average(task, path).shared(task.get_submodule(followed))
    }


def _network_tensors(task: Task, shared: Mapping[str, str]) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": _whole(value).detach().cpu()
        for path, network in saved_networks(task).items()
        for name, value in network.state_dict().items()
        if f"{path}.{name}" not in shared
    }


def _named_parameters(task: Task, group: str) -> dict[int, str]:
    """Parameter name by identity, over the networks of a group."""
    return {
        id(parameter): f"{path}.{name}"
        for path in task.groups[group].paths
        for name, parameter in unwrapped(task.get_submodule(path)).named_parameters()
    }


def _optimizer_state(
    task: Task, optimizers: Mapping[str, torch.optim.Optimizer]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by `group/parameter/key`, and the numbers: settings of the parameter groups, and non-tensor state."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for group, optimizer in optimizers.items():
        names = _named_parameters(task, group)
        numbers: dict[str, Any] = {}
        for parameter, entries in optimizer.state.items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{group}/{names[id(parameter)]}/{key}"] = _whole(value).detach().cpu()
                else:
                    numbers[f"{names[id(parameter)]}/{key}"] = value
        plain = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        settings[group] = {"param_groups": plain, "numbers": numbers}
    return tensors, settings


@torch.no_grad()
def _load_optimizers(
    task: Task,
    optimizers: Mapping[str, torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> None:
    for group, optimizer in optimizers.items():
        if group not in settings:
            raise ValueError(f"the checkpoint has no optimiser state of {group!r}")
        by_name = {name: key for key, name in _named_parameters(task, group).items()}
        parameters = {id(p): p for g in optimizer.param_groups for p in g["params"]}
        for key, value in tensors.items():
            owner, name, entry = key.split("/")
            if owner != group or by_name.get(name) not in parameters:
                continue
            parameter = parameters[by_name[name]]
            if value.shape == parameter.shape:
                value = _like(value.to(parameter.device), parameter)
            elif any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups):
                value = value.to(parameter.device)  # step counters live beside the parameters of fused optimisers
            optimizer.state[parameter][entry] = value
        for key, number in settings[group]["numbers"].items():
            name, entry = key.split("/")
            optimizer.state[parameters[by_name[name]]][entry] = number
        for own, saved in zip(optimizer.param_groups, settings[group]["param_groups"], strict=True):
            own.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in own})


def _random_state(generators: Mapping[str, torch.Generator]) -> dict[str, Tensor]:
    states = {f"generator.{name}": g.get_state() for name, g in generators.items()}
    states["torch"] = torch.get_rng_state()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - users' data sets may draw from it
    assert kind == "MT19937"
    states["numpy.keys"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    states["numpy.rest"] = torch.tensor([position, has_gauss, cached], dtype=torch.float64)
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random(states: Mapping[str, Tensor], generators: Mapping[str, torch.Generator]) -> None:
    for name, generator in generators.items():
        generator.set_state(states[f"generator.{name}"])
    torch.set_rng_state(states["torch"])
    position, has_gauss, cached = states["numpy.rest"].tolist()
    keys = states["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))  # noqa: NPY002
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _python_random() -> list[Any]:
    version, state, gauss = random.getstate()
    return [version, list(state), gauss]


def _restore_python_random(state: list[Any]) -> None:
    version, words, gauss = json.loads(json.dumps(state))
    random.setstate((version, tuple(words), gauss))
