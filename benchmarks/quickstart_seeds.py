"""The quickstart over several seeds: its acceptance figures, for `docs/results/`.

Run from the repository's root: `.venv/bin/python benchmarks/quickstart_seeds.py [--seeds 0 1 2] [--out runs/seeds]`.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import time
from pathlib import Path

import torch

from pantarhei.recipes.quickstart import Quickstart, quickstart
from pantarhei.report import Table

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
PAGE = """# Results

Every figure comes from a run of the command named beside it. Results of the speed comparisons are on the
[benchmarks page](../benchmarks.md), the claims of [rectified flow](rectified-flow/README.md) on a page of their own.

## Quickstart

`python benchmarks/quickstart_seeds.py`: the [quickstart](../quickstart.md) (8x8 digits, one reflow round) with several
seeds, torch {torch}, {threads} threads, {machine}. All figures of each seed are in
[quickstart.json](quickstart.json).

{claims}

![Samples before and after one reflow round, by number of Euler steps](quickstart.png)

Seed {seed} in full:

{first}

The Frechet distance lives in the features of a small classifier that is trained on the same digits; compare it with the
floor (held-out digits against training digits), not with published figures.
"""


def figures(result: Quickstart, seconds: float) -> dict[str, float]:
    """What the acceptance asks about, of one seed."""
    before, after = result.before.rows, result.after.rows
    return {
        "frechet_1_before": before[0].frechet.value,
        "frechet_50_before": before[-1].frechet.value,
        "frechet_1_after": after[0].frechet.value,
        "frechet_50_after": after[-1].frechet.value,
        "floor": result.before.floor,
        "gain_at_1": before[0].frechet.value / after[0].frechet.value,
        "ratio_to_50_before": after[0].frechet.value / before[-1].frechet.value,
        "accuracy_1_after": after[0].accuracy or 0.0,
        "accuracy_50_before": before[-1].accuracy or 0.0,
        "nearest_1_after": after[0].nearest,
        "nearest_held_out": result.after.held_out_nearest,
        "straightness_before": result.straightness_before.normalised,
        "straightness_after": result.straightness_after.normalised,
        "seconds": seconds,
    }


def claims(rows: list[dict[str, float]]) -> Table:
    """Each claim with the median and the range over seeds, and whether it holds."""

    def spread(key: str) -> tuple[float, str]:
        values = [row[key] for row in rows]
        middle = statistics.median(values)
        return middle, f"{middle:.3g} [{min(values):.3g}, {max(values):.3g}]"

    gain, ratio, accuracy = (spread(key) for key in ("gain_at_1", "ratio_to_50_before", "accuracy_1_after"))
    distances = [row["nearest_1_after"] / row["nearest_held_out"] for row in rows]
    nearest = statistics.median(distances)
    seconds = spread("seconds")
    lines = [
        ("1 step: times closer than before", "at least 8", gain[1], gain[0] >= 8),
        ("1 step after / 50 steps before", "at most 2", ratio[1], ratio[0] <= 2),
        ("label accuracy at 1 step after", "at least 0.95", accuracy[1], accuracy[0] >= 0.95),
        (
            "nearest training digit, 1st percentile, samples / held-out",
            "at least 1",
            f"{nearest:.3g} [{min(distances):.3g}, {max(distances):.3g}]",
            nearest >= 1,
        ),
        ("seconds", "at most 360", seconds[1], seconds[0] <= 360),
    ]
    rows_out = [(what, asked, found, "holds" if ok else "does not hold") for what, asked, found, ok in lines]
    return Table(("claim", "asked", "measured, median [range]", ""), rows_out, f"{len(rows)} seeds")


def main() -> None:
    """Run the seeds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    options = parser.parse_args()
    rows, first = [], ""
    for seed in options.seeds:
        folder = options.out / str(seed)
        shutil.rmtree(folder, ignore_errors=True)
        began = time.monotonic()
        result = quickstart(folder, seed=seed)
        rows.append({"seed": seed, **figures(result, time.monotonic() - began)})
        print(result.table().text())
        if seed == options.seeds[0]:
            RESULTS.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "samples.png", RESULTS / "quickstart.png")
            first = result.table().markdown()
    table = claims(rows)
    print(table.text())
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    (RESULTS / "quickstart.json").write_text(json.dumps({"machine": machine, "seeds": rows}, indent=2) + "\n")
    (RESULTS / "README.md").write_text(
        PAGE.format(claims=table.markdown(), first=first, seed=options.seeds[0], **machine)
    )


if __name__ == "__main__":
    main()
