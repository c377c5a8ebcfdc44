"""The figures of the report, by plotly.

In: saves and loads. Out: plotly figures. Pure, but for the import of plotly. Colours are of Okabe and Ito, and of cividis: told
apart by everybody.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from ckpt import config
from ckpt.events import Event
from ckpt.observe.extras import needed
from ckpt.observe.lanes import lanes
from ckpt.observe.summary import FOREGROUND, Operation

COLORS = {
    "call": "#dddddd",
    "walk": "#0072b2",
    "plan": "#56b4e9",
    "wait": "#555555",
    "fence": "#d55e00",
    "copy": "#009e73",
    "checksum": "#f0e442",
    "digest": "#999933",
    "write": "#e69f00",
    "read": "#e69f00",
    "exchange": "#cc79a7",
    "restore": "#009e73",
    "receipts": "#cc79a7",
    "commit": "#9a9a9a",
}
_OTHER = "#a6761d"
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
_STRAGGLER = "#b2182b"
_RANKS_WITH_NUMBERS_MAX = 24  # more rows than these are too low for text
_ROW_PX, _HEAT_PX_MIN, _HEAT_PX_MAX = 26, 100, 620
_MARK_PX = 14
_RANKS_WITH_SCALE_MIN = 8  # fewer rows are too low for a colour scale; their cells have numbers
_LANE_PX, _TIMELINE_PX_MAX = 15, 900
_RANKS_WITH_LANES_MAX = 64  # more rows than these are too low for lanes


def heat_map(operation: Operation) -> Any:
    """Rank x phase: colour is time beyond the median rank, so that a straggler is the one bright cell."""
    go = needed("plotly.graph_objects", extra="report", what="the report")
    phases = [phase for phase in operation.phases if phase not in ("total", "call")]
    ranks = list(operation.seconds)
    excess = {phase: operation.excess_s(phase) for phase in phases}
    taken = [[operation.seconds[rank].get(phase) for phase in phases] for rank in ranks]
    top_s = max((value for found in excess.values() for value in found.values()), default=0.0)
    few = len(ranks) <= _RANKS_WITH_NUMBERS_MAX
    figure = go.Figure(
        go.Heatmap(
            x=[html.escape(phase) for phase in phases],
            y=list(range(len(ranks))),
            z=[[excess[phase].get(rank) for phase in phases] for rank in ranks],
            customdata=[[[rank, value] for value in row] for rank, row in zip(ranks, taken, strict=True)],
            text=[["" if v is None else seconds_text(v) for v in row] for row in taken] if few else None,
            texttemplate="%{text}" if few else None,
            colorscale="Cividis",
            zmin=0.0,
            zmax=max(top_s, 0.05 * (operation.total_s or 0.0), 1e-6),
            xgap=2,
            ygap=1 if len(ranks) <= 128 else 0,
            colorbar={"title": {"text": "s beyond the<br>median rank"}, "thickness": 12, "len": 1.0, "x": 1.09},
            showscale=len(ranks) >= _RANKS_WITH_SCALE_MIN,
            hovertemplate="rank %{customdata[0]}, %{x}<br>%{customdata[1]:.4g} s,"
            " %{z:.4g} s beyond the median rank<extra></extra>",
        )
    )
    height = min(max(_ROW_PX * len(ranks) + 55, _HEAT_PX_MIN), _HEAT_PX_MAX)
    _style(figure, height=height, y_title="rank")
    figure.update_layout(
        plot_bgcolor="#ececec", xaxis={"side": "top", "showgrid": False}, margin={"t": 40, "r": 190, "b": 10}
    )
    _number_rows(figure, ranks)
    if operation.straggler is not None:
        at, column = ranks.index(operation.straggler.rank), phases.index(operation.straggler.phase)
        half = max(0.5, len(ranks) * _MARK_PX / height / 2)  # of many ranks, the frame is higher than the row
        figure.add_shape(
            type="rect",
            x0=column - 0.5,
            x1=column + 0.5,
            y0=at - half,
            y1=at + half,
            line={"color": _STRAGGLER, "width": 2},
        )
        _arrow(figure, at, operation.straggler.rank)
    return figure


def timeline(operation: Operation) -> Any:
    """A bar per phase and rank, from the start of the first rank on; phases that overlap lie below each other."""
    go = needed("plotly.graph_objects", extra="report", what="the report")
    ranks = timeline_ranks(operation)
    row = {rank: number for number, rank in enumerate(ranks)}
    shown = [event for event in operation.events if event.rank in row and event.phase != "total" and event.seconds > 0]
    lane_of, num_lanes = _phase_lanes(operation, shown) if len(ranks) <= _RANKS_WITH_LANES_MAX else ({}, 1)
    factor = 1.0 if (operation.total_s or 1.0) >= 1.0 else 1000.0
    thick = (0.86 if len(ranks) <= _RANKS_WITH_LANES_MAX else 1.0) / num_lanes
    top = -thick * num_lanes / 2
    figure = go.Figure()
    for phase in _drawn_in_order(operation):
        found = [event for event in shown if event.phase == phase]
        figure.add_bar(
            name=html.escape(phase),
            orientation="h",
            y=[row[event.rank] for event in found],
            base=[(event.start_s - operation.start_s) * factor for event in found],
            x=[event.seconds * factor for event in found],
            width=thick,
            offset=top + thick * lane_of.get(phase, 0),
            legendrank=operation.phases.index(phase) + 1,
            marker={"color": COLORS.get(phase, _OTHER), "line": {"width": 0}},
            customdata=[[event.rank, event.seconds, event.nbytes / 2**20] for event in found],
            hovertemplate=f"rank %{{customdata[0]}}, {html.escape(phase)}<br>%{{customdata[1]:.4g}} s"
            "<br>%{customdata[2]:.1f} MiB<extra></extra>",
        )
    height = min(max(_LANE_PX * num_lanes * len(ranks) + 110, 170), _TIMELINE_PX_MAX)
    _style(figure, height=height, y_title="rank")
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "traceorder": "normal"}
    figure.update_layout(barmode="overlay", bargap=0.0, legend=legend)
    unit = "s" if factor == 1.0 else "ms"
    stop_s = max((event.start_s + event.seconds for event in shown), default=operation.start_s + 1.0)
    figure.update_xaxes(
        title={"text": f"{unit} since the first rank began, by the clock of each rank's node"},
        range=[0.0, (stop_s - operation.start_s) * factor * 1.02],
        zeroline=False,
    )
    _number_rows(figure, ranks)
    straggler = operation.straggler
    if straggler is not None and straggler.rank in row:
        at = row[straggler.rank]
        figure.add_hrect(y0=at - 0.5, y1=at + 0.5, fillcolor=_STRAGGLER, opacity=0.12, line_width=0, layer="below")
        _arrow(figure, at, straggler.rank)
        figure.update_layout(margin={"r": 100})
    return figure


def timeline_ranks(operation: Operation) -> list[int]:
    """The ranks that the timeline has room for: all, or those with the greatest excess, in order."""
    ranks = list(operation.seconds)
    if len(ranks) <= config.REPORT_RANKS_MAX:
        return ranks
    late = dict.fromkeys(ranks, 0.0)
    for phase in operation.phases:
        for rank, excess_s in operation.excess_s(phase).items():
            late[rank] = max(late[rank], excess_s)
    if operation.straggler is not None:
        late[operation.straggler.rank] = float("inf")
    return sorted(sorted(ranks, key=lambda rank: (-late[rank], rank))[: config.REPORT_RANKS_MAX])


def over_steps(saves: Sequence[Operation]) -> Any:
    """Three rows over the step: speed, time until durable, stall."""
    subplots = needed("plotly.subplots", extra="report", what="the report")
    rows = (
        ("GB/s until durable", "#0072b2", [_giga(save.bytes_per_s) for save in saves]),
        ("s until durable", "#e69f00", [save.total_s if save.outcome == "ok" else None for save in saves]),
        ("stall, ms", "#d55e00", [None if save.stall_s is None else save.stall_s * 1e3 for save in saves]),
    )
    figure = subplots.make_subplots(rows=len(rows), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    steps = [save.step for save in saves]
    for number, (title, color, values) in enumerate(rows, start=1):
        trace = {"mode": "lines+markers", "line": {"color": color}, "marker": {"size": 7}, "connectgaps": True}
        figure.add_scatter(
            x=steps,
            y=values,
            row=number,
            col=1,
            showlegend=False,
            hovertemplate="step %{x}: %{y:.4g}<extra></extra>",
            **trace,
        )
        figure.update_yaxes(title={"text": title}, rangemode="tozero", row=number, col=1)
    for outcome, symbol, color in (("failed", "x", _STRAGGLER), ("skipped", "circle-open", "#4d4d4d")):
        bad = [save.step for save in saves if save.outcome == outcome]
        if bad:
            marker = {"symbol": symbol, "size": 11, "color": color, "line": {"width": 2}}
            figure.add_scatter(
                x=bad, y=[0] * len(bad), row=2, col=1, mode="markers", marker=marker, name=outcome, cliponaxis=False,
                hovertemplate=f"step %{{x}} {outcome}<extra></extra>",
            )  # fmt: skip
    _style(figure, height=520)
    figure.update_xaxes(title={"text": "step"}, row=len(rows), col=1)
    figure.update_layout(legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"}, hovermode="closest")
    return figure


def seconds_text(seconds: float) -> str:
    """`1.23 s`, `4.5 ms`, `120 µs`."""
    if seconds >= 1.0 or seconds == 0.0:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def _giga(bytes_per_s: float | None) -> float | None:
    return None if bytes_per_s is None else bytes_per_s / 1e9


def _drawn_in_order(operation: Operation) -> list[str]:
    """Phases but for `total`, the longest first: where bars share a lane, the shorter one lies on the longer one."""
    median_s = {found.phase: found.median_s for found in operation.stats if found.phase != "total"}
    return sorted(median_s, key=lambda phase: (phase != "call", -median_s[phase]))


def _phase_lanes(operation: Operation, shown: Sequence[Event]) -> tuple[dict[str, int], int]:
    """Phase -> lane, the same on all ranks: of the training thread first, then of the background; and how many there are.

    A phase goes to the first lane where on no rank it overlaps with another. `call` contains others: it is behind them.
    """
    spans: dict[str, dict[int, list[Event]]] = {}
    for event in shown:
        spans.setdefault(event.phase, {}).setdefault(event.rank, []).append(event)
    placed: dict[str, int] = {}
    num_lanes = 1
    for front in (True, False):
        begin = 0 if front else num_lanes
        for phase in [phase for phase in operation.phases if phase in spans and phase != "call"]:
            if (operation.operation == "load" or phase in FOREGROUND) is front:
                lane = begin
                while any(_overlap(spans[phase], spans[other]) for other in placed if placed[other] == lane):
                    lane += 1
                placed[phase] = lane
                num_lanes = max(num_lanes, lane + 1)
    return {"call": 0, **placed}, num_lanes


def _overlap(one: dict[int, list[Event]], other: dict[int, list[Event]]) -> bool:
    """Whether on any rank two phases are going on at once."""
    return any(max(lanes([*found, *other.get(rank, [])], nested=False)) > 0 for rank, found in one.items())


def _style(figure: Any, *, height: float, y_title: str = "") -> None:
    figure.update_layout(
        template="plotly_white",
        height=height,
        font={"family": _FONT, "size": 12},
        margin={"l": 70, "r": 20, "t": 30, "b": 45},
        hoverlabel={"font": {"family": _FONT}},
    )
    if y_title:
        figure.update_yaxes(title={"text": y_title})


def _number_rows(figure: Any, ranks: Sequence[int]) -> None:
    """One row per rank, the first on top, with the numbers of as many as have room."""
    some = range(0, len(ranks), max(1, -(-len(ranks) // _RANKS_WITH_NUMBERS_MAX)))
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(some),
        ticktext=[str(ranks[i]) for i in some],
        showgrid=False,
        zeroline=False,
        autorange=False,
        range=[len(ranks) - 0.5, -0.5],
    )


def _arrow(figure: Any, at: int, rank: int) -> None:
    figure.add_annotation(
        x=1.0,
        xref="paper",
        y=at,
        text=f"<b>◀ rank {rank}</b>",
        showarrow=False,
        xanchor="left",
        font={"color": _STRAGGLER},
    )
