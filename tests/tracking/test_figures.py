"""The figures are drawn for realistic and for odd input, and say what they show."""

import io
import math

import pytest

pytest.importorskip("matplotlib")

from cur_modifier.tracking import figures

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def names(layers, projections=PROJECTIONS):
    return [f"model.layers.{layer}.block.{name}" for layer in layers for name in projections]


def render(figure):
    png = io.BytesIO()
    figure.savefig(png, format="png")
    assert png.getvalue().startswith(b"\x89PNG")


def panels(figure):
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def test_spectra_have_a_panel_a_projection_and_a_line_and_a_dot_a_layer():
    values = [i**-0.5 for i in range(1, 577)]
    figure = figures.spectra({name: (values, 256) for name in names(range(30))})
    assert [axes.get_title() for axes in panels(figure)] == list(PROJECTIONS)
    for axes in panels(figure):
        assert axes.get_yscale() == "log"
        assert len(axes.lines) == 60
        line, dot = axes.lines[0], axes.lines[1]
        assert line.get_ydata()[0] == 1.0
        assert list(dot.get_xdata()) == [256]
        assert list(dot.get_ydata()) == pytest.approx([1 / 16])
    render(figure)


@pytest.mark.parametrize(
    "spectra",
    [
        {},
        {"lm_head": ([3.0, 1.0], 1)},
        {"model.layers.3.q_proj": ([1.0, 0.5, 0.0], 3)},
        {"model.layers.3.q_proj": ([0.0, 0.0], 1)},
        {"a.0.q": ([2.0], 1), "a.1.q": ([math.nan], 1), "b": ([], 1)},
    ],
)
def test_odd_spectra_are_drawn(spectra):
    render(figures.spectra(spectra))


def test_rank_map_places_and_writes_the_ranks():
    figure = figures.rank_map(
        {name: 64 for name in names([1, 3], PROJECTIONS[:3])} | {"lm_head": 9}
    )
    (axes,) = panels(figure)
    assert [label.get_text() for label in axes.get_yticklabels()] == [*PROJECTIONS[:3], "lm_head"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3", "none"]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    expected = {(layer, row): "64" for layer in (1, 3) for row in range(3)}
    assert cells == expected | {(4, 3): "9"}
    assert figure.legends
    render(figure)


def test_relative_errors_are_written_in_percent():
    errors = {"layers.0.q_proj": 0.0312, "layers.1.q_proj": 0.456, "layers.2.q_proj": math.nan}
    figure = figures.relative_error_map(errors)
    assert [text.get_text() for text in panels(figure)[0].texts] == ["3.1", "46"]
    assert any(axes.get_ylabel() == "relative error (%)" for axes in figure.axes)
    render(figure)
    render(figures.relative_error_map({}))


def test_large_rank_maps_have_no_numbers_and_experts_share_a_cell():
    figure = figures.rank_map({name: 64 for name in names(range(80))})
    assert not panels(figure)[0].texts
    render(figure)
    experts = {f"layers.0.experts.{e}.up_proj": rank for e, rank in enumerate((10, 30))}
    assert [text.get_text() for text in panels(figures.rank_map(experts))[0].texts] == ["20"]
    render(figures.rank_map({}))


@pytest.mark.parametrize(
    ("metric", "unit"), [("angular_distance", "π"), ("expected_loss_growth_nats", "nats")]
)
def test_layer_costs_mark_the_chosen_layers(metric, unit):
    figure = figures.layer_costs(metric, [0.5, 0.2, math.inf, 0.4], [1])
    (axes,) = panels(figure)
    dense, chosen = axes.containers
    assert [bar.get_height() for bar in chosen] == [0.2]
    assert chosen[0].get_hatch()
    assert len(dense) == 3
    assert unit in axes.get_ylabel()
    render(figure)
    render(figures.layer_costs(metric, [], []))


def test_kept_units_have_a_line_a_kind():
    kept = [("neurons", 2, 0.5), ("neurons", 0, 0.75), ("heads", 1, 1.0), ("neurons", 1, 1.0)]
    figure = figures.kept_units(kept)
    (axes,) = panels(figure)
    lines = {line.get_label(): line for line in axes.lines}
    assert lines.keys() == {"neurons", "heads"}
    assert list(lines["neurons"].get_xdata()) == [0, 1, 2]
    assert list(lines["neurons"].get_ydata()) == [0.75, 1.0, 0.5]
    assert list(lines["heads"].get_xdata()) == [1]
    assert axes.get_ylim()[0] == 0
    render(figure)


def test_loss_curve_marks_the_step_that_is_kept():
    train = [(s, 1 / s) for s in range(1, 1001)]
    rate = [(s, 1e-3 / s) for s in range(1, 1001)]
    figure = figures.loss_curve(train, [(0, 1.0), (20, 0.5), (40, math.nan)], rate, 20)
    losses, rates = figure.axes
    labels = [text.get_text() for text in losses.get_legend().get_texts()]
    assert labels == ["training", "validation", "kept: step 20"]
    assert len(losses.lines[0].get_xdata()) == 500
    assert rates.get_ylabel() == "learning rate"
    render(figure)
    render(figures.loss_curve([], [(0, 0.0)], [], 0))


def test_drawing_does_not_touch_pyplot(run_python):
    code = """
from cur_modifier.tracking import figures
figures.rank_map({"a.0.q": 1}).savefig("/dev/null", format="png")
print("matplotlib.pyplot" in sys.modules)
"""
    assert run_python(code).strip() == "False"
