"""`pantarhei info` and `pantarhei list`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import tyro

from pantarhei.cli.main import VERBS
from pantarhei.cli.teachers import PairMethod
from pantarhei.data import SERIES, TOYS
from pantarhei.data.shards import HEADER, ShardStore
from pantarhei.files import read_json
from pantarhei.flow import Flow
from pantarhei.flow.couplings import COUPLINGS
from pantarhei.flow.fields import SETS
from pantarhei.flow.gammas import GAMMAS
from pantarhei.flow.grids import WARPS
from pantarhei.flow.interpolants import INTERPOLANTS
from pantarhei.flow.noise_amounts import NoiseForm
from pantarhei.flow.observations import OBSERVATIONS
from pantarhei.flow.paths import PATHS
from pantarhei.flow.predictions import PREDICTIONS
from pantarhei.flow.pretrained import SPEC
from pantarhei.flow.times import TIME_LAWS
from pantarhei.flow.updates import PATH_METHODS
from pantarhei.images import AUGMENTATIONS
from pantarhei.interop import consistency, diffusers, load
from pantarhei.interop.loading import READERS, content_of
from pantarhei.networks import CONFIGS
from pantarhei.recipes.cards import fields_in_words, path_in_words
from pantarhei.recipes.perceptual import MetricName
from pantarhei.recipes.rectified_flow import PRESETS
from pantarhei.recipes.registry import RECIPES
from pantarhei.recipes.systems import SYSTEMS
from pantarhei.report import Table
from pantarhei.solve import METHODS
from pantarhei.solve.sde import SDE_METHODS
from pantarhei.straighten import inspect_pairs, open_pairs
from pantarhei.straighten.rectified_diffusion import LOSSES
from pantarhei.straighten.state_pairs import holds_states
from pantarhei.training import Run, checkpoints
from pantarhei.training.runs import CONFIG


def info(path: tyro.conf.Positional[Path]) -> int:
    """Describe a run folder, a saved flow, somebody else's checkpoint, or a store of pairs.

    Args:
        path: the folder or file.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if (path / HEADER).is_file() or holds_states(path):
        rows = _store(path)
    elif path.is_file():
        rows = _file(path)
    elif (path / SPEC).is_file() or (not (path / CONFIG).is_file() and diffusers.recognise(path)):
        rows = _flow(path)
    else:
        rows = _run(path)
    _print(Table(("", str(path)), rows))
    return 0


def list_names() -> int:
    """Print the systems and every name that options take."""
    rows: list[tuple[str, str]] = [
        ("recipes (train)", ", ".join(RECIPES)),
        ("straighten", ", ".join(VERBS["straighten"])),
        ("losses of rectified diffusion", ", ".join(LOSSES)),
        ("distances of images", ", ".join(get_args(MetricName))),
        ("pair methods", ", ".join(get_args(PairMethod))),
        ("files of others", ", ".join(READERS)),
        ("presets", ", ".join(PRESETS)),
        ("data", f"digits, a folder or zip of images, CIFAR-10 files, parquet, hf:NAME, {', '.join(TOYS)}"),
        ("series", f"FILE.npy, FILE.safetensors, {', '.join(SERIES)}"),
        ("augmentations", ", ".join(AUGMENTATIONS)),
        ("networks", ", ".join(CONFIGS)),
        ("paths", ", ".join(PATHS)),
        ("interpolants", ", ".join(INTERPOLANTS)),
        ("latents (gamma)", ", ".join(GAMMAS)),
        ("predictions", ", ".join(PREDICTIONS)),
        ("fields (with a latent)", ", ".join("+".join(names) for names in SETS)),
        ("observations", ", ".join(OBSERVATIONS)),
        ("time laws", ", ".join(TIME_LAWS)),
        ("couplings", ", ".join(COUPLINGS)),
        ("methods", ", ".join([*METHODS, *PATH_METHODS])),
        ("stochastic methods", ", ".join(SDE_METHODS)),
        ("forms of epsilon", ", ".join(get_args(NoiseForm))),
        ("grids", ", ".join([*WARPS, "logsnr", "karras", "edm", "reference"])),
    ]
    print(Table(("kind", "names"), rows).text())
    print()
    print(Table(("system", "paper", "state"), [(s.name, s.paper, s.state) for s in SYSTEMS]).text())
    return 0


def _run(path: Path) -> list[tuple[str, Any]]:
    run = Run.open(path)
    newest = checkpoints.newest(run.checkpoints)
    metrics = [line for line in run.metrics() if "loss" in line]
    rows: list[tuple[str, Any]] = [
        ("kind", f"run of {run.config.get('system', 'a task')}"),
        ("data", run.config["data"].get("name", "")),
        ("checkpoint", "none yet" if newest is None else int(newest.name)),
        ("iterations asked", run.config["loop"]["iterations"]),
    ]
    if metrics:
        rows += [("last loss", metrics[-1]["loss"]), ("training time", f"{metrics[-1]['seconds']:.0f} s")]
    return rows + (_flow(path) if newest is not None and "flow" in run.config.get("task", {}) else [])


def _file(path: Path) -> list[tuple[str, Any]]:
    """What a file is, and the flow in it where it holds one."""
    found = consistency.sniff(content_of(path))
    if found.kind == "unknown":
        return _flow(path)
    rows: list[tuple[str, Any]] = [("kind", f"{found.words}: {found.why}")]
    if found.missing:
        whole = found.kind in ("edm", "edm-or-cm")
        rows.append(("missing for jumps to any time" if whole else "missing", found.missing))
    if found.kind in ("discriminator", "optimizer", "ours"):
        return rows
    if found.kind == "edm-or-cm":
        named = consistency.kind_in_name(path)
        if named is None:
            return [*rows, ("to open it", "say which it is: load(path, kind='cm') or kind='edm'")]
        rows.append(("read as", f"{consistency.WORDS[named]}, by the name of the file"))
    return rows + _flow(path)


def _flow(path: Path) -> list[tuple[str, Any]]:
    flow = load(path)
    provenance = flow.provenance
    head = getattr(flow, "head", None)
    jumps = [] if head is None else [("head", ", ".join(str(value) for value in head.spec().values()))]
    return [
        *jumps,
        ("network", f"{type(flow.network).__name__}, {sum(p.numel() for p in flow.network.parameters()):,} parameters"),
        ("path, prediction", f"{path_in_words(flow.spec()['path'])}, {fields_in_words(flow.spec()['predicts'])}"),
        ("sample shape", "x".join(map(str, flow.shape or ())) or "not known"),
        ("conditions", ", ".join(flow.conditions) or "none"),
        ("coupling", f"{provenance.coupling}, rectified {provenance.rectified}x"),
        ("teacher", provenance.teacher or "none"),
        *([("method", provenance.notes["method"])] if "method" in provenance.notes else []),
        ("score, SDE", _score(flow)),
    ]


def _score(flow: Flow) -> str:
    try:
        flow.require_score()
    except ValueError as error:
        return str(error)
    return "available"


def _store(path: Path) -> list[tuple[str, Any]]:
    ours = (path / HEADER).is_file()
    pairs = not ours or read_json(path / HEADER).get("kind") == "pairs"
    store: Any = open_pairs(path) if pairs else ShardStore(path)
    missing = store.missing()
    rows: list[tuple[str, Any]] = [(key, str(value)) for key, value in store.header.items() if key != "flow"]
    if ours:
        rows.append(("missing shards", f"{len(missing)} of {ShardStore(path).shards}"))
    if pairs and not missing:
        found = inspect_pairs(store)
        rows += [
            ("x0 mean, deviation", f"{found.source_mean:.3f}, {found.source_std:.3f}"),
            ("x1 mean, deviation", f"{found.data_mean:.3f}, {found.data_std:.3f}"),
            ("warnings", "; ".join(found.warnings) or "none"),
        ]
    return rows


def _print(table: Table) -> None:
    from rich.console import Console

    Console().print(table.rich())
