"""Plots: labels that neither overlap nor leave the axes, colours that are variables, text that stays text."""

import itertools
import re
import warnings

import pytest

from openmla.lab import plot
from openmla.lab.plot import Line, Spot

GAP = 10.0


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [
        ([5.0, 50.0, 90.0], [5.0, 50.0, 90.0]),
        ([50.0, 50.0], [45.0, 55.0]),
        ([40.0, 50.0, 51.0, 52.0], [33.25, 43.25, 53.25, 63.25]),
        ([99.0, 99.0, 99.0], [80.0, 90.0, 100.0]),
        ([0.0, 1.0, 2.0], [0.0, 10.0, 20.0]),
    ],
)
def test_labels_stand_apart_and_inside(wanted, placed):
    found = plot._apart(wanted, GAP, 0.0, 100.0)
    assert found == pytest.approx(placed)
    assert all(b - a >= GAP - 1e-9 for a, b in itertools.pairwise(found))


def every_plot():
    line = [Line("ours", [(1024, 1.0), (4096, 4.0)], 0), Line("peer", [(1024, 2.0), (4096, 3.0)], 1, is_dashed=True)]
    words = {"salt": "s", "title": "a title", "heading": "a heading"}
    yield plot.lines(line, limits=[("roof", 4.2)], **words)
    yield plot.lines(line, is_log=True, **words)
    yield plot.dots(["a", "b"], {"x": [0.5, 2.0], "y": [None, 3.0]}, **words)
    yield plot.bars([("a name that is far longer than thirty letters", 3.0), ("b", 0.0)], **words)
    yield plot.scatter({"a": [(8, 2.0), (64, 1.0)], "b": [(32, 1.5)]}, x_label="kept", **words)
    spots = [Spot(3.0, 0.5, "a case", True), Spot(300.0, 1.0, "b", False)]
    yield plot.roofline([("product", 1.0)], [("memory", 50.0), ("cache", 200.0)], spots, salt="s", title="a title")


def test_labels_stand_beside_their_lines():
    """Where limits follow from the data alone, a label must know them: its place is within the picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = plot.scatter(
            {"low": [(12, 2.1), (136, 2.1)], "high": [(40, 2.2)]}, salt="s", title="t", heading="h", x_label="x"
        )
    height = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg).group(1))
    place = {name: float(re.search(rf'y="([-\d.]+)"[^>]*>{name}<', svg).group(1)) for name in ("low", "high")}
    assert 0 < place["high"] < place["low"] < height


def test_pictures_have_a_name_and_only_colours_of_the_page():
    for svg in every_plot():
        assert 'role="img" aria-label="a title"' in svg
        assert set(re.findall(r"#[0-9a-fA-F]{6}\b", svg)) == set(), "a colour that dark mode cannot change"
        assert "var(--c0)" in svg
        assert set(re.findall(r"font-family: ([^;\"]*)", svg)) == {"inherit"}
        assert "<text" in svg
        assert "http" not in svg.replace("http://www.w3.org", "")
