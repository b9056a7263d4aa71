"""The pictures of reports: what stands where, and which labels are legible."""

from context_pythia.report.figures import Point, draw_frontier, draw_settings, unbeaten


def test_names_in_the_frontier_do_not_overlap():
    names = [f"model number {i}" for i in range(9)]
    crowd = [Point(name, name, 4096 * (1 + i // 4), 50 + i / 5, name) for i, name in enumerate(names)]
    axes = draw_frontier(crowd, {name: name == names[0] for name in names}, "").axes[0]
    boxes = [label.get_window_extent() for label in axes.texts]
    assert len(boxes) == 9
    assert all(a.count_overlaps(boxes) == 1 for a in boxes)  # itself


def test_a_model_far_above_the_others_is_an_arrow_with_its_perplexity():
    models = {"whole": (8192, 68.0), "half": (4096, 69.0), "quarter": (2048, 71.0), "other": (2048, 121.5)}
    points = [Point(name, name, *place, name) for name, place in models.items()]
    axes = draw_frontier(points, {name: name == "whole" for name in models}, "").axes[0]
    assert [label.get_text() for label in axes.texts] == ["whole", "half", "quarter", "other: 121.5"]
    assert axes.get_ylim()[1] < 90
    assert [line.get_marker() for line in axes.lines[1:]] == ["D", "o", "o", "^"]


def test_a_sweep_shows_the_settings_that_nothing_beats_and_has_a_line_for_each_of_the_best_thirty():
    def height(count):
        points = [Point(f"Pythia {i}", "Pythia", 4096, i, "") for i in range(1, count + 1)]
        figure = draw_settings(points, [[point.perplexity] for point in points], {"Pythia": True}, "")
        return figure.get_figheight(), figure.axes[0].get_title()

    assert height(2)[0] < height(30)[0] == height(40)[0] and height(40)[1] == " (best 30 of 40)"
    places = {"a": (2, 5.0), "b": (1, 6.0), "c": (2, 6.0), "d": (4, 5.0)}
    assert [point.name for point in unbeaten([Point(name, name, *at, name) for name, at in places.items()])] == [
        "b",
        "a",
    ]
