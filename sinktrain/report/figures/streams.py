"""Plots of what a stream can do without its first tokens, what it remembers, and what it costs."""

from __future__ import annotations

from sinktrain.report import wording
from sinktrain.report.figures.look import SOFT, Look, Spec, model_looks
from sinktrain.report.figures.source import Source, drawn_models
from sinktrain.report.figures.spec import Figure, axis, layout, log_axis, marks, points, whisker_layout
from sinktrain.report.wording import Results, Row

TASKS = {"streameval": "StreamEval", "access": "Access test"}


def removal_figures(results: Results, text: str) -> list[Figure]:
    """What it costs to remove the first tokens, or to put line breaks in their place."""
    rows = Source.of(results, "removal").where(lambda row: row["text"] == text)
    looks = model_looks(results)
    figures = []
    for test, group in rows.by(lambda row: row["test"]).items():
        traces = []
        for model, of_model in group.by(lambda row: row["model"]).items():
            fields: Spec = {"y": "delta_nats", "low": "ci95.0", "high": "ci95.1", "unit": " nats"}
            places = [_removal_words(row) for row in of_model.rows]
            traces.append(points(of_model, model, looks[model], places=places, offsetgroup=model, **fields))
        what = "First tokens removed" if test == "removed" else "Kept tokens replaced by line breaks"
        words = list(dict.fromkeys(_removal_words(row) for row in group.rows))
        frame = whisker_layout("loss added, nats", words, traces, has_zero=True)
        figures.append(
            Figure(f"removal/{text}/{test}", f"{what}, on {text}; whiskers: 95% over text", traces, frame)
        )
    return figures


def _removal_words(row: Row) -> str:
    return f"{wording.counted(row['num_tokens'], 'token')}, {wording.layout_name(row)}"


def recall_figures(results: Results) -> list[Figure]:
    """Accuracy by distance of the answer, a panel for each task and model; windows and chance marked."""
    drawn = drawn_models(results)
    rows = Source.of(results, "streameval").where(lambda row: row["model"] in drawn)
    figures = []
    for (task, model), panel in rows.by(lambda row: (row["task"], row["model"])).items():
        lines = _recall_lines(panel)
        x = log_axis("distance of the answer, tokens", lines, "x", tickformat=",~r")
        y = axis("accuracy", range=[-0.03, 1.06], tickformat=".0%")
        windows = marks(panel.where(lambda row: row["policy"] == "streaming"), "window")
        caption = f"{TASKS.get(task, task)}, {model}; dotted: the windows' ends, and chance; whiskers: 95%"
        frame = layout(x, y, **windows)
        figures.append(Figure(f"recall/{task}/{model}", caption, lines, frame))
    return figures


def _recall_lines(panel: Source) -> list[Spec]:
    """A line for each layout, and one for chance over all distances."""
    panel = panel.ordered(lambda row: row["distance_tokens"])
    fields: Spec = {"x": "distance_tokens", "y": "accuracy", "low": "ci95.0", "high": "ci95.1"}
    of_layout = panel.by(wording.layout_name)
    lines = [
        points(of_layout[name], name, Look.of(series), mode="lines+markers", **fields)
        for series, name in enumerate(wording.layout_names(panel.rows))
    ]
    grey = Look(SOFT, "circle", "dot")
    longest = max(of_layout.values(), key=lambda rows: len(rows.rows))
    chance = points(longest, "chance", grey, x="distance_tokens", y="chance", mode="lines")
    return [*lines, chance]


def cost_figures(results: Results) -> list[Figure]:
    """Time per token, peak memory and cache size by stream position, and time by cache size."""
    drawn = drawn_models(results)
    rows = Source.of(results, "latency").where(lambda row: row["model"] in drawn)
    if not rows:
        return []
    with_cache = rows.where(lambda row: row["cache_bytes"] is not None)
    found = [
        _cost_figure(
            results,
            rows,
            "ms_per_token_p50",
            "Time per token by stream length; whiskers: 95th percentile",
            "ms per token",
        ),
        _cost_figure(results, rows, "peak_mem_bytes", "Peak memory by stream length", "bytes"),
    ]
    if with_cache:
        found.append(
            _cost_figure(
                results, with_cache, "cache_bytes", "Keys and values kept, by stream length", "bytes"
            )
        )
    return found + _cache_size_figures(results, rows)


def _cost_figure(results: Results, rows: Source, field: str, caption: str, unit: str) -> Figure:
    looks = model_looks(results)
    settings = list(dict.fromkeys(_setting(row) for row in rows.rows))
    traces = []
    for (model, setting), group in rows.by(lambda row: (row["model"], _setting(row))).items():
        look = Look(looks[model].colour, *_symbol_and_dash(settings.index(setting)))
        high: Spec = {"high": "ms_per_token_p95"} if field.startswith("ms_") else {}
        ordered = group.ordered(lambda row: row["stream_pos"])
        name = f"{model}, {setting}"
        traces.append(points(ordered, name, look, x="stream_pos", y=field, mode="lines+markers", **high))
    x = log_axis("stream position, tokens", traces, "x")
    y = log_axis(unit, traces, "y", tickformat="~s" if unit == "bytes" else "~r")
    return Figure(f"cost/{field}", caption, traces, layout(x, y))


def _cache_size_figures(results: Results, rows: Source) -> list[Figure]:
    """The paper's Figure 10: time per token by cache size, at the longest stream of each setting."""
    looks = model_looks(results)
    bounded = rows.where(lambda row: row["policy"] != "dense")
    longest = {
        key: max(group.rows, key=lambda row: row["stream_pos"])["stream_pos"]
        for key, group in bounded.by(_series_of_setting).items()
    }
    bounded = bounded.where(lambda row: row["stream_pos"] == longest[_series_of_setting(row)])
    if len(set(bounded.values("sinks+window"))) < 2:
        return []
    policies = list(dict.fromkeys(row["policy"] for row in bounded.rows))
    traces = []
    for (model, policy, batch), group in bounded.by(
        lambda row: (row["model"], row["policy"], row["batch"])
    ).items():
        look = Look(looks[model].colour, *_symbol_and_dash(policies.index(policy)))
        ordered = group.ordered(lambda row: row["sinks"] + row["window"])
        name = f"{model}, {policy}{f', batch {batch}' if batch > 1 else ''}"
        field: Spec = {"x": "sinks+window", "y": "ms_per_token_p50", "high": "ms_per_token_p95"}
        traces.append(points(ordered, name, look, mode="lines+markers", **field))
    x = log_axis("cache size, tokens", traces, "x")
    y = log_axis("ms per token", traces, "y", tickformat="~r")
    caption = "Time per token by cache size, at the longest stream; whiskers: 95th percentile"
    return [Figure("cost/cache-size", caption, traces, layout(x, y))]


def _series_of_setting(row: Row) -> tuple[object, ...]:
    return row["model"], row["policy"], row["sinks"], row["window"], row["batch"]


def _setting(row: Row) -> str:
    return wording.layout_name(row) + (f", batch {row['batch']}" if row["batch"] > 1 else "")


def _symbol_and_dash(series: int) -> tuple[str, str]:
    look = Look.of(series)
    return look.symbol, look.dash
