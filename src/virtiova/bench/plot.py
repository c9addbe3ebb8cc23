# SPDX-License-Identifier: Apache-2.0
"""The results as a picture: throughput and latency against depth and against mappings, the bit off and on.

matplotlib is asked for only here, and only if a picture is.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from virtiova.bench.rows import Document, Row, Setting
from virtiova.bench.table import number
from virtiova.errors import NotPossibleError, UsageError

KINDS: Final = ("svg", "png")


def check(name: str) -> None:
    """`UsageError` for a file that is no picture, `NotPossibleError` where none can be made: before anything runs."""
    if name.rpartition(".")[2] not in KINDS:
        raise UsageError(f"--plot {name}: wanted a name that ends in .svg or .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise NotPossibleError("--plot needs matplotlib: pip install 'virtiova[plot]'")


@dataclass(frozen=True, slots=True)
class _Panel:
    """One diagram: which rows are in it, and what is on its axes."""

    title: str
    figure: str
    unit: str
    across: str
    take: Callable[[Setting], bool]


def _by_depth(front: str) -> Callable[[Setting], bool]:
    return lambda setting: setting.front == front and setting.mappings <= 1 and setting.pages > 0


def _by_mappings(setting: Setting) -> bool:
    return setting.front == "poll" and setting.mappings > 0


_RATE, _DELAY = "requests/s", "latency, median"
_REQUESTS: Final = (
    _Panel("throughput, the front end polls", _RATE, "requests/s", "depth", _by_depth("poll")),
    _Panel("throughput, the front end sleeps", _RATE, "requests/s", "depth", _by_depth("sleep")),
    _Panel("median latency, the front end polls", _DELAY, "us", "depth", _by_depth("poll")),
    _Panel("median latency, the front end sleeps", _DELAY, "us", "depth", _by_depth("sleep")),
    _Panel("throughput, the front end polls", _RATE, "requests/s", "mappings", _by_mappings),
    _Panel("median latency, the front end polls", _DELAY, "us", "mappings", _by_mappings),
)
_IOTLB: Final = tuple(
    _Panel(figure, figure, "us", "mappings", lambda _: True) for figure in ("pair", "pair, acknowledged", "miss")
)


def picture(document: Document, kind: str) -> bytes:
    """The file's content, of one of `KINDS`."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    iotlb = bool(document.rows) and document.rows[0].bench == "iotlb"
    some = [panel for panel in (_IOTLB if iotlb else _REQUESTS) if _chosen(document.rows, panel)]
    # One depth, or one number of mappings, is no diagram where there are others.
    drawn = [panel for panel in some if len(_places(document.rows, panel)) > 1] or some
    # Text stays text, and the same results make the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "virtiova"}):
        figure = Figure(figsize=(8.0, 3.4 * max(1, len(drawn))), layout="constrained")
        axes = figure.subplots(max(1, len(drawn)), 1, squeeze=False)
        for panel, axis in zip(drawn, axes[:, 0], strict=False):
            _draw(axis, panel, document.rows)
        trust = "" if not document.against else "\nNOT TO BE TRUSTED: " + "; ".join(document.against)
        figure.suptitle("medians of the rounds, with the least and the most" + trust, fontsize="small", wrap=True)
        made = io.BytesIO()
        figure.savefig(made, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return made.getvalue()


def _chosen(rows: Sequence[Row], panel: _Panel) -> list[Row]:
    found = [row for row in rows if row.figure == panel.figure and row.samples and panel.take(row.setting)]
    if panel.across == "mappings" and found and found[0].bench != "iotlb":
        # The number of mappings varies at one depth only.
        depths = {row.setting.depth for row in found if row.setting.mappings > 1}
        found = [row for row in found if row.setting.depth in depths]
    return found


def _places(rows: Sequence[Row], panel: _Panel) -> set[int]:
    return {int(getattr(row.setting, panel.across)) for row in _chosen(rows, panel)}


def _draw(axis: Any, panel: _Panel, rows: Sequence[Row]) -> None:
    lines: dict[str, list[Row]] = {}
    for row in _chosen(rows, panel):
        lines.setdefault(_label(row, panel), []).append(row)
    for label, found in lines.items():
        found.sort(key=lambda row: int(getattr(row.setting, panel.across)))
        across = [int(getattr(row.setting, panel.across)) for row in found]
        middle = [row.mid or 0.0 for row in found]
        down = [mid - (row.low or 0.0) for mid, row in zip(middle, found, strict=True)]
        up = [(row.high or 0.0) - mid for mid, row in zip(middle, found, strict=True)]
        style = "--" if label.endswith(("bit off", "distinct pages")) else "-"
        axis.errorbar(
            across, middle, yerr=[down, up], label=label, marker="o", markersize=3, capsize=2, linestyle=style
        )
    axis.set_title(panel.title, fontsize="medium")
    if rows[0].bench == "iotlb":
        axis.set_xscale("symlog", linthresh=100)
    else:
        axis.set_xscale("log", base=2)
        ticks = sorted(_places(rows, panel))
        turned = 30 if panel.across == "mappings" else 0
        axis.set_xticks(ticks, [f"{at}" for at in ticks], fontsize="small", rotation=turned)
        axis.minorticks_off()
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: number(value))
    axis.yaxis.set_minor_formatter(lambda *_: "")
    axis.spines[["top", "right"]].set_visible(False)
    below = "live mappings" if panel.across == "mappings" else panel.across
    axis.set_xlabel("resident mappings" if rows[0].bench == "iotlb" else below)
    axis.set_ylabel(panel.unit)
    axis.grid(True, alpha=0.3)
    axis.legend(fontsize="small", frameon=False)


def _label(row: Row, panel: _Panel) -> str:
    if row.bench == "iotlb":
        return row.subject
    subject = row.subject if row.setting.ring == "split" else f"{row.subject}, packed ring"
    if panel.across == "depth":
        return f"{subject}, bit {'on' if row.setting.bit else 'off'}"
    distinct = row.setting.mappings == row.setting.pages
    return f"{subject}, distinct pages" if distinct else subject
