"""The pages of a plot of words. This module needs matplotlib."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from granite_speech.transcription.subtitles import one_line
from granite_speech.transcription.transcript import Word

__all__ = ["pages"]

# Seconds in a row, and rows on a page: as much as can be read.
_ROW, _ROWS = 10.0, 6
_FRAMES = 100  # of the spectrogram, in a second
_DOTS = 110  # in an inch
# Inches: margins of the page; heights of the three axes of a row, which are below each other, and what is below each.
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 14.0, 0.65, 0.2, 0.65, 0.15
_SPECTROGRAM, _LANE, _CONFIDENCE, _BETWEEN, _BELOW = 1.2, 0.22, 0.6, 0.07, 0.45
_ACROSS = _WIDTH - _LEFT - _RIGHT
# Words whose labels do not fit beside each other are in lanes below each other. What does not fit into so many has no label.
_LANES = 5
_PADDING = 0.04  # inches around a label
_SIZE = 8.5  # of the font, in points
_LONGEST = 24  # characters of a label

_WORD = {"facecolor": "#c6dbef", "edgecolor": "#86aed6", "linestyle": "-"}
_BRIDGED = {"facecolor": "#f7f7f7", "edgecolor": "#8c8c8c", "linestyle": "--"}
_COMBINED, _CTC, _LM = "#d9d9d9", "#1f5fa8", "#d9651a"
_KILOHERTZ = (0.5, 1, 2, 4)
_DARKEST = 7.0 / 4  # below the loudest frame; a tenth of the energy is 1/4


@dataclass
class _Placed:
    """A word in a row.

    Attributes:
        lane: from 0, at the top.
        label: what is written, and at which second it begins; None: it has none, because there is no room or it is in the next row.
    """

    word: Word
    lane: int
    label: tuple[str, float] | None


@dataclass
class _Row:
    """A stretch of the recording, in seconds, and its words."""

    start: float
    end: float
    placed: list[_Placed]
    lanes: int
    unlabelled: int


def pages(words: Sequence[Word], mel: np.ndarray, seconds: float, title: str) -> Iterator[Figure]:
    """The pages of a plot, at least one.

    Args:
        words: of the recording.
        mel: its spectrogram, `(frames, bands)`, 100 frames a second.
        seconds: its length.
        title: in the first line of each page.
    """
    count = math.ceil(seconds / _ROW)
    width = _ROW if count > _ROWS else max(seconds, 0.5) / count  # one page is filled
    words, ruler = sorted(words, key=lambda one: one.start), _Ruler()
    rows = [_row(words, number * width, (number + 1) * width, number == count - 1, ruler) for number in range(count)]
    groups = [rows[first : first + _ROWS] for first in range(0, count, _ROWS)]
    for number, group in enumerate(groups, 1):
        heading = f"{title}   page {number} of {len(groups)}".strip() if len(groups) > 1 else title
        yield _page(group, mel, heading)


class _Ruler:
    """Measures labels."""

    def __init__(self) -> None:
        self._figure = Figure(dpi=_DOTS)
        self._renderer = FigureCanvasAgg(self._figure).get_renderer()

    def inches(self, label: str) -> float:
        text = Text(0, 0, label, fontsize=_SIZE, parse_math=False, figure=self._figure)
        return text.get_window_extent(self._renderer).width / _DOTS


def _row(words: Sequence[Word], start: float, end: float, is_last: bool, ruler: _Ruler) -> _Row:
    """Place each word in the first lane where neither its bar nor its label touches those before it.

    A word in two rows has its label in the row that has its middle. Words before the first row and after the last one are at its edge.
    """
    second = _ACROSS / (end - start)  # inches
    free = [start] * _LANES  # from when on each lane is
    row = _Row(start, end, [], 1, 0)
    for word in words:
        began, ended = max(word.start, 0.0), max(word.end, word.start, 0.0)
        if (began >= end and not is_last) or (ended <= start and began < start):
            continue
        begin, stop = min(max(began, start), end), min(ended, end)
        label, left, right = None, begin, stop
        middle = (began + ended) / 2
        if middle >= start and (middle < end or is_last):
            text = _shortened(one_line(word.word))
            length = (ruler.inches(text) + 2 * _PADDING) / second
            at = max(start, min(begin + max(stop - begin - length, 0) / 2, end - length))
            label, left, right = (text, at + _PADDING / second), min(begin, at), max(stop, at + length)
        lane = next((lane for lane in range(_LANES) if free[lane] <= left), None)
        if lane is None:
            lane = min(range(_LANES), key=free.__getitem__)
            row.unlabelled += label is not None
            label, right = None, stop
        free[lane] = max(free[lane], right)
        row.placed.append(_Placed(word, lane, label))
        row.lanes = max(row.lanes, lane + 1)
    return row


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _page(rows: Sequence[_Row], mel: np.ndarray, heading: str) -> Figure:
    heights = [_SPECTROGRAM + row.lanes * _LANE + _CONFIDENCE + 2 * _BETWEEN + _BELOW for row in rows]
    height = _TOP + sum(heights) + _BOTTOM
    figure = Figure(figsize=(_WIDTH, height), dpi=_DOTS)
    loudest = float(mel.max())
    below = height - _TOP
    for row in rows:
        axes = []
        for tall in (_SPECTROGRAM, row.lanes * _LANE, _CONFIDENCE):
            axes.append(figure.add_axes((_LEFT / _WIDTH, (below - tall) / height, _ACROSS / _WIDTH, tall / height)))
            below -= tall + _BETWEEN
        below -= _BELOW - _BETWEEN
        for one in axes:
            one.set_xlim(row.start, row.end)
            one.tick_params(labelsize=_SIZE)
        _draw_spectrogram(axes[0], row, mel, loudest)
        _draw_words(axes[1], row)
        _draw_confidence(axes[2], row)
    top = 1 - 0.3 / height
    figure.text(_LEFT / _WIDTH, top, _heading(heading, rows), fontsize=11, va="center", parse_math=False)
    _draw_legend(figure, rows, (1 - _RIGHT / _WIDTH, top))
    return figure


def _heading(heading: str, rows: Sequence[_Row]) -> str:
    missing = sum(row.unlabelled for row in rows)
    return f"{heading}   ({missing} words without room for their label)".strip() if missing else heading


def _draw_spectrogram(axes: Axes, row: _Row, mel: np.ndarray, loudest: float) -> None:
    first, last = round(row.start * _FRAMES), round(row.end * _FRAMES)
    part = mel[first:last].T
    if part.shape[1]:
        extent = (row.start, row.start + part.shape[1] / _FRAMES, 0, len(part))
        axes.imshow(part, origin="lower", aspect="auto", cmap="magma", vmin=loudest - _DARKEST, vmax=loudest, extent=extent)
    edges = [time for one in row.placed for time in (one.word.start, one.word.end) if row.start < time < row.end]
    axes.vlines(edges, 0, len(part), colors="white", linewidths=0.5)
    # Bands are spaced evenly in HTK's mel scale, up to 8 kHz.
    places = [len(part) * math.log1p(kilohertz / 0.7) / math.log1p(8 / 0.7) for kilohertz in _KILOHERTZ]
    axes.set_yticks(places, [f"{kilohertz:g}" for kilohertz in _KILOHERTZ])
    axes.set_ylim(0, len(part))
    axes.set_ylabel("kHz", fontsize=_SIZE)
    axes.yaxis.set_label_coords(-0.025, 0.5)
    axes.set_xlim(row.start, row.end)
    axes.tick_params(labelbottom=False, bottom=False)


def _draw_words(axes: Axes, row: _Row) -> None:
    axes.set_ylim(row.lanes, 0)
    for bridged, style in ((False, _WORD), (True, _BRIDGED)):
        bars = [one for one in row.placed if one.word.bridged is bridged]
        lengths = [max(one.word.end - one.word.start, 0.0) for one in bars]
        starts = [one.word.start for one in bars]
        axes.barh([one.lane + 0.5 for one in bars], lengths, 0.8, starts, linewidth=0.7, **style)
    for one in row.placed:
        if one.label is not None:
            text, at = one.label
            axes.text(at, one.lane + 0.5, text, fontsize=_SIZE, va="center_baseline", parse_math=False)
    axes.set_axis_off()


def _draw_confidence(axes: Axes, row: _Row) -> None:
    words = [one.word for one in row.placed]
    lengths = [max(one.end - one.start, 0.0) for one in words]
    axes.bar([one.start for one in words], [one.confidence for one in words], lengths, align="edge", color=_COMBINED, edgecolor="white")
    for name, color, style in (("ctc_confidence", _CTC, "solid"), ("lm_confidence", _LM, (0, (3, 1)))):
        known = [one for one in words if one[name] is not None]
        axes.hlines([one[name] for one in known], [one.start for one in known], [one.end for one in known], color, style, linewidth=1.6)
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0, 0.5, 1], ["0", "", "1"])
    axes.grid(axis="y", linewidth=0.4, color="#cccccc")
    axes.set_axisbelow(True)
    axes.set_ylabel("confidence", fontsize=_SIZE)
    axes.yaxis.set_label_coords(-0.025, 0.5)
    axes.set_xlabel("seconds", fontsize=_SIZE, labelpad=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xticks(np.arange(math.ceil(row.start), math.floor(row.end + 1e-6) + 1))


def _draw_legend(figure: Figure, rows: Sequence[_Row], place: tuple[float, float]) -> None:
    words = [one.word for row in rows for one in row.placed]
    entries = [(Patch(**_WORD), "word")]
    if any(one.bridged for one in words):
        entries.append((Patch(**_BRIDGED), "word without a time of its own"))
    entries.append((Patch(color=_COMBINED), "confidence"))
    if any(one.ctc_confidence is not None for one in words):
        entries.append((Line2D([], [], color=_CTC, linewidth=1.6), "of the CTC head"))
    if any(one.lm_confidence is not None for one in words):
        entries.append((Line2D([], [], color=_LM, linewidth=1.6, linestyle=(0, (3, 1))), "of the language model"))
    figure.legend(*zip(*entries, strict=True), loc="center right", bbox_to_anchor=place, ncols=len(entries), frameon=False, fontsize=9)
