import io

import pytest
from rich.console import Console

from pantarhei.metrics import Interval
from pantarhei.report import Table

table = Table(
    ["model", "steps", "distance"],
    [["before <b>", 1, 9.96], ["after | reflow", 50, Interval(0.8613, 0.7991, 0.9312)], ["held-out", None, 1.04]],
    "Features: pixels [raw]",
)


def test_text_is_aligned():
    lines = table.text().splitlines()
    assert lines[0] == "Features: pixels [raw]"
    assert lines[1] == "model           steps           distance"
    assert lines[3] == "before <b>          1               9.96"
    assert lines[4] == "after | reflow     50  0.86 [0.80, 0.93]"
    assert len(lines) == 6


def test_markdown_escapes_bars_and_aligns_figures():
    lines = table.markdown().splitlines()
    assert lines[1] == "| --- | ---: | ---: |"
    assert lines[3] == "| after \\| reflow | 50 | 0.86 [0.80, 0.93] |"
    assert lines[-1] == "*Features: pixels [raw]*"


def test_html_is_escaped():
    text = table.html()
    assert "<td>before &lt;b&gt;</td>" in text
    assert '<td class="number">0.86 [0.80, 0.93]</td>' in text
    assert '<th scope="col">model</th>' in text
    assert "<caption>Features: pixels [raw]</caption>" in text


def test_rich_shows_brackets_as_they_are():
    console = Console(file=io.StringIO(), width=100)
    console.print(table.rich())
    shown = console.file.getvalue()
    assert "0.86 [0.80, 0.93]" in shown
    assert "pixels [raw]" in shown


def test_an_empty_table_still_has_heads():
    assert Table(["a", "b"], []).text().splitlines()[0] == "a  b"


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match=r"rows\[1\] has 1 cells"):
        Table(["a", "b"], [[1, 2], [1]])
    with pytest.raises(ValueError, match="columns"):
        Table([], [])
