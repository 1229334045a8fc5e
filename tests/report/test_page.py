import base64
import io
import os
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from pantarhei.files import write_atomically
from pantarhei.metrics import Interval
from pantarhei.report import Page, Table, curves, image_grid

VOID = {"meta", "img", "link", "br"}


class Reader(HTMLParser):
    """Checks that elements close in order, and collects attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page():
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    return (
        Page("Title <script>", "sub & title")
        .heading("First part")
        .text("One.\n\nTwo <b>.")
        .facts({"distance": Interval(0.8613, 0.7991, 0.9312), "count": 1797})
        .table(Table(["a"], [[1]], "caption <i>"))
        .heading("Second part")
        .heading("Detail", level=3)
        .figure(curves({"a": ([0, 1], [0, 1])}), 'a "curve"')
        .figure(image_grid(images), "grid", alt="six digits")
        .figures({"before": images, "after": image_grid(images)})
        .images(images)
        .code("pantarhei train <x>")
    )


def test_it_is_well_formed_and_escaped(page):
    text = page.html()
    Reader(text)
    assert "<title>Title &lt;script&gt;</title>" in text
    assert "<p>One.</p>\n<p>Two &lt;b&gt;.</p>" in text
    assert "caption &lt;i&gt;" in text
    assert "train &lt;x&gt;" in text
    assert "<script" not in text
    assert "<dt>distance</dt><dd>0.86<small> [0.80, 0.93]</small></dd>" in text


def test_it_loads_nothing(page):
    text = page.html()
    seen = Reader(text).seen
    sources = [attrs["src"] for _, attrs in seen if "src" in attrs]
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not [attrs for tag, attrs in seen if tag in ("link", "script")]
    assert not re.search(r"https?://|@import|url\(", text)
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).verify()


def test_pictures_have_alternative_texts(page):
    seen = Reader(page.html()).seen
    assert [attrs["alt"] for tag, attrs in seen if tag == "img"] == [
        'a "curve"',
        "six digits",
        "before",
        "after",
        "6 images",
    ]


def test_sections_are_linked_from_the_top(page):
    seen = Reader(page.html()).seen
    links = [attrs["href"] for tag, attrs in seen if tag == "a"]
    places = [attrs["id"] for tag, attrs in seen if tag == "h2"]
    assert links == [f"#{place}" for place in places]
    assert len(set(places)) == 2


def test_saving_replaces_at_once(page, tmp_path):
    path = tmp_path / "new" / "report.html"
    Page("old").save(path)
    assert page.save(path) == path
    assert path.read_text(encoding="utf-8") == page.html()
    assert os.listdir(path.parent) == ["report.html"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_atomically(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(TypeError, match="PIL image"):
        Page("a").figure("picture.png")
    with pytest.raises(ValueError, match="level"):
        Page("a").heading("b", level=1)
    with pytest.raises(ValueError, match="file name"):
        Page("a").save(tmp_path)
