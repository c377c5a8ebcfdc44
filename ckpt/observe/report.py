"""The report of a run: one HTML page that needs nothing but a browser.

In: events. Out: the text of the page. Never asks a network for anything (the page forbids itself to), never trusts a text of the
log.
"""

from __future__ import annotations

import datetime
import html
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ckpt import config
from ckpt.events import Event
from ckpt.observe import figures
from ckpt.observe.extras import needed
from ckpt.observe.figures import seconds_text
from ckpt.observe.summary import Operation, operations

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_CONFIG = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}

PHASES = (
    ("call", "the whole call, as the training loop saw it; contains walk, plan and wait"),
    ("walk", "the state to tensors with boxes"),
    ("plan", "which bytes go where; at a new structure with an exchange between the ranks"),
    ("wait", "for the image of an earlier save to become free"),
    ("fence", "the training thread held before an update, because copies were behind"),
    ("copy", "device or host memory to the image"),
    ("checksum", "of the image"),
    ("digest", "SHA-256 of fragments, of incremental saves"),
    ("write", "image to the store, until durable"),
    ("receipts", "rank 0: until all ranks have written"),
    ("commit", "rank 0: index and manifest; other ranks: until the outcome is known"),
    ("read", "store to memory"),
    ("exchange", "between ranks that share their reads"),
    ("restore", "memory to the state"),
)

_STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; color: #1a1a1a; background: #fff;
  max-width: 1180px; margin: 0 auto; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 19px; margin: 40px 0 4px; }
h3 { font-size: 15px; margin: 18px 0 0; }
p { margin: 4px 0; } .quiet { color: #595959; } .late { color: #b2182b; font-weight: 600; }
.facts { display: flex; flex-wrap: wrap; gap: 8px; margin: 18px 0; }
.fact { border: 1px solid #d0d0d0; border-radius: 6px; padding: 8px 12px; font-size: 13px; }
.fact b { display: block; font-size: 17px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; margin-top: 8px; }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { border-bottom: 2px solid #8c8c8c; } td.text, th.text { text-align: left; }
tr.failed td { background: #fbe9e7; } tr.skipped td { background: #f2f2f2; } td.error { white-space: normal; min-width: 220px; }
"""


def report_page(
    events: Iterable[Event],
    *,
    run: str,
    step: int | None = None,
    left_out: str = "",
    now: datetime.datetime | None = None,
) -> str:
    """The page.

    Args:
        run: the run, as it stands in the title.
        step: show the save of this step; None: the latest one. The slowest one is always shown.
        left_out: what of the log could not be shown, in words.
        now: when the report was made.
    """
    found = operations(events)
    saves = [operation for operation in found if operation.operation == "save"]
    loads = [operation for operation in found if operation.operation == "load"]
    made = (now or datetime.datetime.now(datetime.UTC)).strftime("%Y-%m-%d %H:%M:%S UTC")
    parts = [
        f"<h1>Checkpoints of {html.escape(run)}</h1>",
        f'<p class="quiet">{_count(saves, "save")} and {_count(loads, "load")}, from the event log. Report made {made}.</p>',
        f'<p class="late">{html.escape(left_out)}</p>' if left_out else "",
        _facts(saves),
        *_chosen(saves, loads, step),
        _steps(saves),
        _table("Saves", "saves", saves),
        _table("Loads", "loads", loads),
        _glossary(),
    ]
    return _page(f"{run}: checkpoints", "\n".join(part for part in parts if part))


def _chosen(saves: Sequence[Operation], loads: Sequence[Operation], step: int | None) -> list[str]:
    """The operations that are shown whole: the latest save (or that of `step`), the slowest, the latest load."""
    whole = [save for save in saves if save.total_s is not None and save.outcome != "skipped"]
    of_step = [save for save in whole if step is None or save.step == step]
    parts = []
    if of_step:
        parts.append(_operation("Latest save" if step is None else "Chosen save", "latest", of_step[-1]))
    good = [save for save in whole if save.outcome == "ok"]
    slowest = max(good, key=lambda save: save.total_s or 0.0, default=None)
    if slowest is not None and (not of_step or slowest is not of_step[-1]):
        parts.append(_operation("Slowest save", "slowest", slowest))
    if loads:
        parts.append(_operation("Latest load", "load", loads[-1]))
    return parts


def _operation(title: str, name: str, operation: Operation) -> str:
    shown = len(figures.timeline_ranks(operation))
    of_ranks = f", the {shown} slowest of {len(operation.seconds)} ranks" if shown < len(operation.seconds) else ""
    return "\n".join(
        (
            f'<section id="{name}"><h2>{title}: step {operation.step}</h2>',
            f"<p>{html.escape(_sentence(operation))}</p>",
            f'<p class="late">{html.escape(operation.error)}</p>' if operation.error else "",
            _straggler(operation),
            f"<h3>{'Rank × phase: bright is slower than the others' if len(operation.seconds) > 1 else 'Phases'}</h3>",
            _figure(figures.heat_map(operation), f"{name}-heat"),
            f"<h3>Timeline of each rank{of_ranks}</h3>",
            _figure(figures.timeline(operation), f"{name}-timeline"),
            "</section>",
        )
    )


def _sentence(operation: Operation) -> str:
    told = len(operation.seconds)
    ranks = (
        f"{told} of {operation.world} ranks told of it" if told < operation.world else f"{told} rank{'s' * (told > 1)}"
    )
    words = [f"{_time(operation.start_s)}, {operation.outcome}, {ranks}"]
    if operation.total_s is not None:
        what = "over" if operation.outcome != "ok" else "durable" if operation.operation == "save" else "done"
        words.append(f"{what} after {seconds_text(operation.total_s)}")
    if operation.stall_s is not None:
        words.append(f"training held for {seconds_text(operation.stall_s)}")
    if operation.nbytes:
        words.append(f"{_giga(operation.nbytes)} GB{_speed(operation, ' at {} GB/s')}")
    return "; ".join(words) + "."


def _straggler(operation: Operation) -> str:
    if operation.straggler is not None:
        return f'<p class="late">Straggler: {html.escape(str(operation.straggler).replace("`", ""))}.</p>'
    if len(operation.seconds) > 1:
        return '<p class="quiet">No straggler: no rank took much longer than the others in its own work.</p>'
    return ""


def _count(found: Sequence[Operation], noun: str) -> str:
    return f"{len(found):,} {noun}{'' if len(found) == 1 else 's'}"


def _facts(saves: Sequence[Operation]) -> str:
    good = [save for save in saves if save.outcome == "ok"]
    count = {word: sum(save.outcome == word for save in saves) for word in ("failed", "skipped")}
    facts = [
        ("last durable step", str(max((save.step for save in good), default="none"))),
        ("saves ok / failed / skipped", f"{len(good)} / {count['failed']} / {count['skipped']}"),
        ("straggler of the latest", (_late(good[-1]) if good else "") or "none"),
        ("median stall", _median(good, lambda save: save.stall_s, seconds_text)),
        ("median time to durable", _median(good, lambda save: save.total_s, seconds_text)),
        ("median speed", _median(good, lambda save: save.bytes_per_s, lambda value: f"{_giga(value)} GB/s")),
    ]
    boxes = "".join(f'<div class="fact"><b>{html.escape(value)}</b>{name}</div>' for name, value in facts)
    return f'<div class="facts">{boxes}</div>'


def _median(
    found: Sequence[Operation], value: Callable[[Operation], float | None], text: Callable[[float], str]
) -> str:
    values = [number for number in map(value, found) if number is not None]
    return text(statistics.median(values)) if values else "-"


def _steps(saves: Sequence[Operation]) -> str:
    if not saves:
        return ""
    return (
        f'<section id="steps"><h2>Over the steps</h2>\n{_figure(figures.over_steps(saves), "steps-figure")}</section>'
    )


def _table(title: str, name: str, found: Sequence[Operation]) -> str:
    if not found:
        return ""
    shown = found[-config.REPORT_ROWS_MAX :]
    note = f'<p class="quiet">The newest {len(shown):,} of {len(found):,}.</p>' if len(shown) < len(found) else ""
    columns: list[tuple[str, Callable[[Operation], str]]] = [
        ("step", lambda o: str(o.step)),
        ("start", lambda o: _time(o.start_s)),
        ("outcome", lambda o: o.outcome),
        ("ranks", lambda o: str(o.world) if len(o.seconds) == o.world else f"{len(o.seconds)} of {o.world}"),
        ("stall", lambda o: _maybe(o.stall_s)),
        ("durable after" if name == "saves" else "took", lambda o: _maybe(o.total_s) if o.outcome == "ok" else "-"),
        ("GB", lambda o: _giga(o.nbytes) if o.nbytes else "-"),
        ("GB/s", lambda o: _speed(o, "{}") or "-"),
        ("straggler", _late),
        ("attempt", lambda o: o.attempt[:12]),
        ("error", lambda o: o.error),
    ]  # fmt: skip
    unused = {"stall", "attempt"} if name == "loads" else set()
    columns = [(head, cell) for head, cell in columns if head not in unused]
    text = {"outcome": "text", "straggler": "text", "attempt": "text", "start": "text", "error": "text error"}
    head = "".join(f'<th class="{text.get(head, "")}">{head}</th>' for head, _ in columns)
    rows = "\n".join(
        f'<tr class="{o.outcome}">'
        + "".join(f'<td class="{text.get(head, "")}">{html.escape(cell(o))}</td>' for head, cell in columns)
        + "</tr>"
        for o in reversed(shown)
    )
    return (
        f'<section><h2>{title}</h2>{note}<div class="scroll"><table id="{name}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _late(operation: Operation) -> str:
    late = operation.straggler
    return "" if late is None else f"rank {late.rank}, {late.phase} +{seconds_text(late.seconds - late.median_s)}"


def _maybe(seconds: float | None) -> str:
    return "-" if seconds is None else seconds_text(seconds)


def _speed(operation: Operation, text: str) -> str:
    speed = operation.bytes_per_s
    return "" if speed is None else text.format(_giga(speed))


def _giga(number: float) -> str:
    return f"{number / 1e9:,.0f}" if number >= 1e11 else f"{number / 1e9:.3g}"


def _glossary() -> str:
    rows = "".join(f'<tr><td class="text"><b>{name}</b></td><td class="text">{text}</td></tr>' for name, text in PHASES)
    return (
        f"<section><h2>Phases</h2><table>{rows}</table>"
        "<p class='quiet'>Stall is call and fence of the slowest rank. Durable is from the call until the outcome was known, on"
        " the slowest rank. GB are 10⁹ bytes. The median of two ranks is the quicker one.</p></section>"
    )


def _figure(figure: Any, name: str) -> str:
    plotly = needed("plotly.io", extra="report", what="the report")
    return str(plotly.to_html(figure, include_plotlyjs=False, full_html=False, div_id=name, config=_CONFIG))


def _page(title: str, body: str) -> str:
    library = needed("plotly.offline", extra="report", what="the report").get_plotlyjs()
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>\n<script>{library}</script></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _time(seconds: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return "at an unknown time"
