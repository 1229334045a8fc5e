"""The model card of a run: `README.md` in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pantarhei.files import write_atomically
from pantarhei.training import Run, TrainResult


def write_card(run: Run, result: TrainResult, *, notes: str = "") -> Path:
    """Write data, teacher, network, training and how to use the run."""
    config = run.config
    flow, network, loop = config["task"]["flow"], config["task"]["network"], config["loop"]
    provenance = flow["provenance"]
    noted = provenance["notes"]
    steps = noted.get("steps", noted.get("sampling_steps", 1 if provenance["rectified"] or "head" in flow else 50))
    verb = "invert" if provenance["notes"].get("direction") else "sample"
    lines = [
        f"# {run.folder.name}",
        "",
        f"A {config.get('system', 'flow')} model trained with PantaRhei.",
        "",
        "| | |",
        "|---|---|",
        f"| data | {provenance['data'] or config['data'].get('name', '')} |",
        f"| path, prediction | {path_in_words(flow['path'])}, {fields_in_words(flow['predicts'])} |",
        *([f"| head | {_settings(flow['head'])} |"] if "head" in flow else []),
        f"| network | {_settings(network)} |",
        f"| coupling | {provenance['coupling']}, rectified {provenance['rectified']}x |",
        f"| training | {result.iteration:,} iterations of batch {loop['batch']}, seed {loop['seed']}, {loop['precision']}, "
        f"{result.seconds:.0f} s |",
    ]
    if provenance["teacher"]:
        lines.append(f"| teacher | {provenance['teacher']} (its licence applies to what it made) |")
    for key, value in provenance["notes"].items():
        # Phases are noted by their bounds.
        shown = len(value) - 1 if key == "phases" and isinstance(value, (list, tuple)) else value
        lines.append(f"| {key.replace('_', ' ')} | {shown} |")
    lines += [
        "",
        "```bash",
        f"pantarhei {verb} {run.folder} --count 64 --steps {steps} --out samples",
        "```",
        "",
        "`evaluation.json`, where there is one, names the feature extractor its distances are measured in.",
    ]
    if notes:
        lines += ["", notes]
    return write_atomically(run.folder / "README.md", ("\n".join(lines) + "\n").encode())


def path_in_words(spec: dict[str, Any]) -> str:
    """A path's `spec()` in words."""
    if spec["name"] != "interpolant":
        return str(spec["name"])
    ends = spec["ends"].get("base", spec["ends"])
    return f"interpolant: {ends['name']} with a latent {_settings(spec['gamma'])}"


def fields_in_words(spec: dict[str, Any]) -> str:
    """A prediction's `spec()` in words."""
    return "+".join(spec.get("names", [spec["name"]]))


def _settings(values: dict[str, Any]) -> str:
    return ", ".join([str(values["name"]), *(f"{k} {v}" for k, v in values.items() if k != "name")])
