"""The figure of an audit: epsilon against charges, charges by run and stage, what was filtered.

In greys and hatches, so that it prints, and with letters drawn as outlines, so that no font is looked for.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from privacy.audit.report import AuditReport, StageSpending

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BARS = 8


def draw(report: AuditReport) -> str:
    """The three panels as one inline SVG element, without a word from outside."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    look: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 7.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titleweight": "bold",
        "axes.titlesize": 8,
        "axes.titlelocation": "left",
        "hatch.linewidth": 0.5,
        "svg.fonttype": "path",
        "svg.hashsalt": "sfumato",
    }
    with mpl.rc_context(look):
        figure = Figure(figsize=(7.2, 2.4), layout="constrained")
        curve, spend, filtered = figure.subplots(1, 3, width_ratios=(1.15, 1, 1.15))
        _draw_curve(curve, report)
        _draw_spend(spend, report.stages)
        _draw_filtered(filtered, report.filtered)
        drawn = io.StringIO()
        # None of these: each would put an address into the page.
        figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = drawn.getvalue()
    described = "Epsilon against charges; charges by run and stage; what the filter did."
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{described}" ', 1)
    return svg


def _draw_curve(axes: Axes, report: AuditReport) -> None:
    spent = report.spending
    assert spent is not None
    axes.set_title("Epsilon against charges")
    charges, epsilons = [0, *(point[0] for point in report.curve)], [0.0, *(point[1] for point in report.curve)]
    axes.plot(charges, epsilons, color="black", marker=".", markersize=3, linewidth=1.2)
    if spent.dataset_cap is not None:
        axes.axhline(spent.dataset_cap, color="black", linestyle="--", linewidth=0.8)
        axes.annotate("the data set's cap", (0, spent.dataset_cap), xytext=(3, -8), textcoords="offset points")
    end = f"{epsilons[-1]:.3g}"
    axes.annotate(end, (charges[-1], epsilons[-1]), xytext=(-5, 0), textcoords="offset points", ha="right", va="center")
    axes.set_xlabel("charges")
    axes.set_ylabel(f"ε at δ = {spent.delta:g}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, color="#dddddd", linewidth=0.5)


def _draw_spend(axes: Axes, stages: Sequence[StageSpending]) -> None:
    axes.set_title("Charges by run and stage")
    shown = list(stages)[-MOST_BARS:][::-1]
    names = [f"{stage.run[:6]}/{stage.stage}" if stage.run else stage.stage for stage in shown]
    once = [stage.steps for stage in shown]
    again = [stage.replayed for stage in shown]
    axes.barh(names, once, color="#9a9a9a", label="first attempts", height=0.6)
    edges = ["black" if number else "none" for number in again]
    axes.barh(names, again, left=once, color="white", edgecolor=edges, hatch="////", label="replays", height=0.6)
    for place, stage in enumerate(shown):
        end = once[place] + again[place], place
        axes.annotate(f"ε {stage.epsilon_alone:.3g}\nalone", end, (3, 0), textcoords="offset points", va="center")
    axes.margins(x=0.35)
    if len(stages) > MOST_BARS:
        axes.set_xlabel(f"charges; the last {MOST_BARS} of {len(stages)} stages")
    else:
        axes.set_xlabel("charges")
    axes.set_ylim(-0.6, max(len(shown), 2) + (0.4 if any(again) else -0.4))
    if any(again):
        axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 1.02))


def _draw_filtered(axes: Axes, filtered: Mapping[str, Mapping[str, Any]]) -> None:
    axes.set_title("What was filtered")
    findings: dict[str, int] = {}
    records = kept = 0
    for metrics in filtered.values():
        for group, words in (("entities", "caption: "), ("metadata", "metadata: "), ("reasons", "not kept: ")):
            for name, count in metrics[group].items():
                if isinstance(count, int) and count:
                    findings[words + str(name)] = findings.get(words + str(name), 0) + count
        for split in metrics["splits"].values():
            records, kept = records + int(split.get("in", 0)), kept + int(split.get("kept", 0))
    if not filtered:
        axes.text(0.5, 0.5, "this run has no filter stage", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    largest = sorted(findings.items(), key=lambda item: item[1])[-MOST_BARS:]
    bars = axes.barh([name for name, _ in largest], [count for _, count in largest], color="#9a9a9a", height=0.6)
    axes.bar_label(bars, padding=2)
    axes.margins(x=0.2)
    axes.set_xlabel(f"findings\n{kept:,} of {records:,} records kept")
    if not findings:
        axes.text(0.5, 0.5, "nothing was found", ha="center", va="center", transform=axes.transAxes)
        axes.set_yticks([])
