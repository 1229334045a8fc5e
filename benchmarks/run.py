"""Run the benchmarks, store their records, and renew the table of the documentation.

python benchmarks/run.py [NAME ...] [--quick]
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from harness import RESULTS, line, save, table

SUITE = (
    "solve_overhead",
    "solve_rows",
    "train_unet",
    "rectified_flow_peer",
    "likelihood_peer",
    "sde_driver",
    "ncsnpp",
    "pairs",
    "state_pairs",
    "trajectory",
    "gradients",
    "time_to_quality",
)
PAGE = RESULTS.parent.parent / "benchmarks.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which benchmarks (all): {', '.join(SUITE)}")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing stored: does everything run?")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in SUITE]
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(SUITE)}")
    for name in options.names or SUITE:
        records = importlib.import_module(name).run(quick=options.quick)
        print(*map(line, records), sep="\n", flush=True)
        if not options.quick:
            _renew(PAGE, table(save(records)))
    return 0


def _renew(page: Path, text: str) -> None:
    """Put the table between the two marks of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
