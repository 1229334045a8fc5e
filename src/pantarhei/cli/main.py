"""The command `pantarhei`: verbs, their help, and errors as short messages."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from pantarhei import __version__
from pantarhei.naming import unknown

# verb -> {kind or "": (module, function, one line)}; modules are imported when they are used.
VERBS: dict[str, dict[str, tuple[str, str, str]]] = {
    "quickstart": {"": ("quickstart", "quickstart", "train on digits, straighten, and look at a page (a few minutes)")},
    "train": {
        "rectified-flow": ("train", "train_rectified_flow", "train a rectified flow on images or points"),
        "stochastic-interpolants": (
            "train",
            "train_stochastic_interpolants",
            "train a bridge from noise or data to data, with a latent noise",
        ),
        "forecasting": (
            "train",
            "train_forecasting",
            "train a bridge from the present state to the law of the next one",
        ),
        "trajectory": (
            "trajectory",
            "train_trajectory",
            "train a model of jumps from data: consistency training, CTM or MeanFlow without a teacher",
        ),
    },
    "straighten": {
        "reflow": ("straighten", "straighten_reflow", "train a flow on its own pairs so that few steps suffice"),
        "distil": ("straighten", "straighten_distil", "distil a flow to a few steps on its own pairs"),
        "rfpp": ("rectify", "straighten_rfpp", "rectified flow++: one better round, from any diffusion model or flow"),
        "rectified-diffusion": (
            "rectify",
            "straighten_rectified_diffusion",
            "a diffusion model goes on training in its own form on its own pairs",
        ),
        "phased": ("rectify", "straighten_phased", "first-order within each of a few phases, from real data"),
        "trajectory": (
            "trajectory",
            "straighten_trajectory",
            "jumps from any time to any later one: CTM, consistency distillation and training, MeanFlow",
        ),
        "compare": (
            "compare",
            "straighten_compare",
            "all of these on one teacher within one budget: a table and a page",
        ),
    },
    "sample": {"": ("sample", "sample", "draw samples from a run")},
    "invert": {"": ("sample", "invert", "run a flow backwards: data to noise, or the second data set to the first")},
    "edit": {
        "interpolate": ("edit", "edit_interpolate", "what lies between two images, through their noises"),
        "translate": (
            "edit",
            "edit_translate",
            "images under another label: to noise under theirs, back under the other",
        ),
    },
    "optimize": {
        "noise": ("optimize", "optimize_noise_of", "the noise of each sample, for any measure of it"),
        "condition": ("optimize", "optimize_condition_of", "a class embedding, from a measure or from examples"),
        "weights": ("optimize", "optimize_weights_of", "the weights, all or low-rank additions: a style"),
        "audit": ("optimize", "optimize_audit", "how easily samples fool a classifier"),
        "posterior": (
            "posterior",
            "optimize_posterior",
            "data from a noisy measurement: in-painting, deblurring, sensors",
        ),
    },
    "evaluate": {"": ("evaluate", "evaluate", "score a run's samples against its data, for several numbers of steps")},
    "forecast": {"": ("forecast", "forecast_run", "ensembles of what follows, scored on held-out trajectories")},
    "convert": {"": ("convert", "convert", "published checkpoints to folders of ours, and back")},
    "analyze": {"": ("analyze", "analyze", "straightness, costs, balance and marginals of a flow, on a page")},
    "adapt": {"": ("adapt", "adapt", "carry features of one domain to another, for a classifier trained there")},
    "reproduce": {"": ("reproduce", "reproduce", "run the experiments behind a system's claims, several seeds")},
    "info": {"": ("info", "info", "what a run, a saved flow or a pair store is")},
    "list": {"": ("info", "list_names", "systems, recipes, methods, paths and other names")},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0, 2 for the user's mistakes, 1 for the machine's faults."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return _run(arguments)
    except (ValueError, TypeError, FileNotFoundError, IsADirectoryError, NotADirectoryError, ImportError) as error:
        return _fail(error, 2)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, MemoryError, FloatingPointError, RuntimeError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def entry() -> None:
    """The console script."""
    sys.exit(main())


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] in ("--version", "version"):
        print(f"pantarhei {__version__}")
        return 0
    verb = arguments.pop(0)
    if verb not in VERBS:
        raise ValueError(unknown("command", verb, VERBS))
    kinds, kind = VERBS[verb], ""
    if "" not in kinds:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_kinds(verb))
            return 0 if arguments else 2
        kind = arguments.pop(0)
        if kind not in kinds:
            raise ValueError(unknown(f"{verb}: recipe", kind, kinds))
    module, function, summary = kinds[kind]
    command = getattr(importlib.import_module(f"pantarhei.cli.{module}"), function)
    import tyro

    arguments, command, summary = with_preset(arguments, command, summary)
    try:
        settings = (tyro.conf.OmitArgPrefixes,)
        prog = f"pantarhei {verb} {kind}".strip()
        result: Any = tyro.cli(command, args=arguments, prog=prog, description=summary, config=settings)
    except SystemExit as stop:  # tyro has printed its help or what it did not understand
        return int(stop.code or 0)
    return int(result or 0)


def with_preset(arguments: list[str], command: Any, summary: str) -> tuple[list[str], Any, str]:
    """`--preset NAME` sets defaults, which other options change: it is taken off before these are read.

    A command that has presets carries them as `command.presets`, name -> its keyword arguments.
    """
    presets = getattr(command, "presets", None)
    if presets is None:
        return arguments, command, summary
    summary = f"{summary}. --preset {{{','.join(presets)}}} sets the defaults shown below; other options change them"
    for i, word in enumerate(arguments):
        name, _, value = word.partition("=")
        if name != "--preset":
            continue
        rest = arguments[i + 1 :]
        if not value:
            value, rest = (rest[0], rest[1:]) if rest else ("", [])
        if value not in presets:
            raise ValueError(unknown("--preset", value, presets))
        return arguments[:i] + rest, functools.partial(command, **presets[value]), summary
    return arguments, command, summary


def _overview() -> str:
    width = max(len(verb) for verb in VERBS)
    lines = [f"pantarhei {__version__}: learn, straighten, sample and read flows", "", "commands:"]
    for verb, kinds in VERBS.items():
        text = kinds[""][2] if "" in kinds else f"{', '.join(kinds)}: {next(iter(kinds.values()))[2]}"
        lines.append(f"  {verb:<{width}}  {text}")
    return "\n".join([*lines, "", "`pantarhei COMMAND --help` shows the options of a command."])


def _kinds(verb: str) -> str:
    lines = [f"pantarhei {verb} {'RECIPE' if verb == 'train' else 'KIND'} ...", ""]
    return "\n".join([*lines, *(f"  {name}: {text}" for name, (_, _, text) in VERBS[verb].items())])


def _warn(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    """Our own warnings as a line; those of others as they are."""
    if category.__module__.startswith("pantarhei"):
        print(f"warning: {message}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *where[:2]))


def _fail(error: BaseException, status: int) -> int:
    if os.environ.get("PANTARHEI_DEBUG"):
        import traceback

        traceback.print_exc()
    print(f"pantarhei: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    entry()
