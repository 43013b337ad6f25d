"""The page of a run: what it holds, and that it costs no compression."""

import pytest

from cur_modifier.tracking import NullTracker, Page

Figure = pytest.importorskip("matplotlib.figure").Figure


class Broken(Figure):
    def savefig(self, *args, **kwargs):
        raise ValueError("no font")


def test_a_figure_that_cannot_be_drawn_is_left_out(warnings):
    page = Page(NullTracker(), "run")
    page.log_figure(Broken(), "spectra.png")
    page.log_figure(Figure(), "rank_map.png")
    assert page.html().count("data:image/png;base64,") == 1
    assert "no font" in warnings[0]


def test_text_is_escaped_and_columns_that_hold_nothing_are_left_out():
    page = Page(NullTracker(), "<run>")
    page.log_table([{"name": "a<b", "rank": 0, "shared": None}], "layers.csv")
    html = page.html()
    assert "&lt;run&gt;" in html and "a&lt;b" in html and "a<b" not in html
    assert 'data-value="0"' in html and "shared" not in html
