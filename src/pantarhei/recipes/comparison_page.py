"""The page of a comparison: one table, quality against evaluations, samples side by side, what the teacher is."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from pantarhei.recipes.comparison_rows import Comparison, file_name
from pantarhei.report import Page
from pantarhei.report.figures import curves


def write_page(result: Comparison, out: Path) -> Path:
    """Write `comparison.html` (and `comparison.md`, the table) into a folder."""
    about, provenance = result.about, result.about["provenance"]
    page = Page(
        f"{about['teacher']}: which way is fastest?",
        "All methods that apply to this teacher, within one budget, beside what needs no training.",
    )
    best = result.best()
    page.facts({f"best with {n} NFE": row.arm for n, row in best.items()})
    page.heading("Quality against evaluations")
    series = {}
    for arm, sampler in dict.fromkeys((r.arm, r.sampler) for r in result.rows):
        rows = [r for r in result.rows if (r.arm, r.sampler) == (arm, sampler)]
        label = arm if sampler != "reinterpolate" else f"{arm}, re-interpolated"
        series[label] = ([r.evaluations for r in rows], [r.frechet for r in rows])
    page.figure(
        curves(series, xlabel="network evaluations", ylabel="Frechet distance", log_x=True, log_y=True, size=(8, 5)),
        f"Frechet distance, 95 % intervals; the teacher's own {result.teacher_evaluations} evaluations reach "
        f"{result.teacher.value:.4g}, held-out data {result.floor:.4g}.",
    )
    page.table(result.table())
    for number in (1, 4):
        pictures = {
            f"{r.arm} ({r.sampler})": _image(out / "rows" / f"{file_name(f'{r.arm} {r.sampler} {r.asked}')}.png")
            for r in result.rows
            if r.asked == number
        }
        found = {name: picture for name, picture in pictures.items() if picture is not None}
        if found:
            page.heading(f"The same noise in {number} evaluation{'s' if number > 1 else ''}")
            names = list(found)
            for first in range(0, len(names), 3):
                page.figures({name: found[name] for name in names[first : first + 3]})
    page.heading("The teacher")
    lines = [
        f"Trained on {provenance['data'] or 'data that its file does not name'}; coupling {provenance['coupling']}, "
        f"rectified {provenance['rectified']} times.",
        *(f"{key.replace('_', ' ')}: {value}" for key, value in provenance["notes"].items()),
        *(f"Not run: {name}, which {reason}." for name, reason in about["skipped"].items()),
        "Students learn from the teacher's samples alone (phased: from the data it was trained on as well).",
    ]
    page.text("\n\n".join(lines))
    page.heading("Everything measured")
    page.table(result.details())
    tables = f"{result.table().markdown()}\n\n{result.details().markdown()}"
    text = f"# {about['teacher']}: comparison\n\n{tables}\n"
    (out / "comparison.md").write_text(text, encoding="utf-8")
    return Path(page.save(out / "comparison.html"))


def _image(path: Path) -> Image.Image | None:
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.convert("RGB")
