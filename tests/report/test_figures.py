"""The pictures of reports: what stands where, and which labels are legible."""

from context_pythia.report import figures
from context_pythia.report.figures import Panel, Series, draw_frontier, draw_panels, draw_settings, frontiers


def test_names_in_the_frontier_do_not_overlap():
    crowd = [Series(f"model number {i}", i == 0, 50 + i / 5, 4096 * (1 + i // 4)) for i in range(9)]
    axes = draw_frontier(crowd, "").axes[0]
    boxes = [label.get_window_extent() for label in axes.texts]
    assert len(boxes) == 9
    assert all(a.count_overlaps(boxes) == 1 for a in boxes)  # itself


def test_equal_curves_show_their_markers_and_shares_have_their_whole_axis():
    curves = {name: [(32, 1.5), (64, 1.5)] for name in ("a", "b", "c")}
    baselines = dict.fromkeys(curves, False)
    axes = draw_panels([Panel("found (%)", "tokens back", curves, shares=True)], baselines).axes[0]
    assert len({line.get_marker() for line in axes.lines}) == 3
    assert {line.get_markerfacecolor() for line in axes.lines} == {"none"}
    low, high = axes.get_ylim()
    assert low <= 0 and high >= 100


def test_a_sweep_names_the_settings_that_nothing_beats_and_has_a_line_for_each_of_the_best(monkeypatch):
    def settings(figures):
        return [
            Series(f"Pythia {i}", True, ppl, size, model="Pythia", setting=str(i), seeds=[ppl - 1, ppl + 1])
            for i, (ppl, size) in enumerate(figures)
        ]

    monkeypatch.setattr(figures, "_ROWS_AT_MOST", 2)
    axes = draw_settings(settings([(10.0 + i, 4096) for i in range(3)]), "By rate").axes[0]
    assert axes.get_title() == "By rate (best 2 of 3)"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Pythia: 0", "Pythia: 1"]
    points = settings([(5.0, 2048), (6.0, 1024), (6.0, 2048), (5.0, 4096)])
    assert frontiers(points) == [[points[1], points[0]]]
    axes = draw_frontier(points, "").axes[0]
    assert [label.get_text() for label in axes.texts] == ["0", "1", "", ""]
    assert [path.vertices[:, 1].tolist() for path in axes.collections[0].get_paths()] == [[4.0, 6.0]]
