"""Plots of paired differences: between models, over seeds, between policies, and by number of kept tokens."""

from __future__ import annotations

from collections import Counter
from operator import itemgetter

from sinktrain.report import wording
from sinktrain.report.contests import with_few_or_base
from sinktrain.report.figures.look import Look, Spec
from sinktrain.report.figures.source import Source, drawn_models
from sinktrain.report.figures.spec import Figure, axis, layout, points, whisker_layout
from sinktrain.report.wording import Results, Row

CI95: Spec = {"low": "ci95.0", "high": "ci95.1"}
OVER_TEXT = "whiskers: 95% over text"


def model_figures(results: Results, text: str) -> list[Figure]:
    """Differences between models; those that evict the first tokens, often a hundred times larger, apart."""
    pairs = _pairs(results, text, "text").where(lambda pair: pair["a"] != pair["b"])
    pairs = pairs.where(with_few_or_base(results))
    if _pairs(results, text, "seeds"):
        seeds = {model["name"]: model["seed"] for model in results["models"]}
        pairs = pairs.where(lambda pair: seeds[pair["a"]] == seeds[pair["b"]])
    groups = pairs.by(_is_evicted)
    return [
        _figure(
            f"differences/{text}/{'evicted' if is_evicted else 'kept'}",
            f"Difference in loss on {text}, {'without' if is_evicted else 'with'} first tokens kept; left of "
            f"zero the first model is better; {OVER_TEXT}",
            groups[is_evicted],
        )
        for is_evicted in (False, True)
        if is_evicted in groups
    ]


def seed_figures(results: Results, text: str) -> list[Figure]:
    """Differences over seeds: the mean with its t interval, and each seed's own difference."""
    pairs = _pairs(results, text, "seeds").where(with_few_or_base(results))
    groups = pairs.by(lambda pair: (wording.pair_words(pair)[0], "evicted" if _is_evicted(pair) else "kept"))
    return [
        _figure(
            f"seeds/{text}/{models}/{kind}",
            f"{models} on {text}: mean of {pairs.rows[0]['num_seeds']} seeds with its 95% interval over "
            "seeds, and each seed",
            pairs,
            has_each=True,
        )
        for (models, kind), pairs in groups.items()
    ]


def policy_figures(results: Results, text: str) -> list[Figure]:
    """Differences between two policies of one model."""
    pairs = _pairs(results, text, "text").where(
        lambda pair: pair["a"] == pair["b"] and len(_over_sides(pair, "policy")) > 1
    )
    caption = f"Difference in loss between policies on {text}; left of zero the first is better; {OVER_TEXT}"
    return [_figure(f"policies/{text}", caption, pairs)] if pairs else []


def gap_figures(results: Results, text: str) -> list[Figure]:
    """What keeping first tokens is worth: loss at x+(N-x) against the layout that most pairs share.

    Each model has a scale of its own: a sink model's gap can be a hundred times that of a vanilla one.
    """
    drawn = drawn_models(results)
    pairs = _pairs(results, text, "text").where(
        lambda pair: (
            pair["a"] == pair["b"]
            and pair["a"] in drawn
            and _over_sides(pair, "policy") == {"streaming"}
            and len(_over_sides(pair, "sinks")) == 2
            and len({wording.num_slots(side) for side in wording.sides(pair)}) == 1
        )
    )
    return [
        _gap_figure(text, model, of_model) for model, of_model in pairs.by(lambda pair: pair["a"]).items()
    ]


def _pairs(results: Results, text: str, interval: str) -> Source:
    return Source.of(results, "paired").where(
        lambda pair: pair["text"] == text and pair["interval"] == interval
    )


def _over_sides(pair: Row, field: str) -> set[object]:
    return {side[field] for side in wording.sides(pair)}


def _is_evicted(pair: Row) -> bool:
    """Whether a side streams without any first token kept."""
    return any(side["policy"] == "streaming" and side["sinks"] == 0 for side in wording.sides(pair))


def _figure(name: str, caption: str, pairs: Source, has_each: bool = False) -> Figure:
    """A series for each pair of models, a row for each layout."""
    traces = []
    for series, (models, group) in enumerate(pairs.by(lambda pair: wording.pair_words(pair)[0]).items()):
        places = [wording.pair_words(pair)[1] for pair in group.rows]
        look = Look.of(series)
        if has_each:
            at = [place for place, pair in zip(places, group.rows, strict=True) for _ in pair["deltas"]]
            faint: Spec = {"marker": {"symbol": "circle-open", "size": 6}, "opacity": 0.7}
            traces.append(points(group, "each seed", look, places=at, y="deltas", unit=" nats", **faint))
        more: Spec = {"offsetgroup": models, "unit": " nats", **CI95}
        traces.append(points(group, models, look, places=places, y="delta_nats", **more))
    words = list(dict.fromkeys(wording.pair_words(pair)[1] for pair in pairs.rows))
    frame = whisker_layout("difference in loss, nats", words, traces, has_zero=True)
    return Figure(name, caption, traces, frame)


def _gap_figure(text: str, model: str, pairs: Source) -> Figure:
    """A line for each N; pairs that have the base on their first side are shown the other way round."""
    base = _shared_sinks(pairs)
    mode = "markers" if base else "lines+markers"  # no line over the base, which is no pair
    traces = []
    lengths = pairs.by(lambda pair: wording.num_slots(wording.sides(pair)[0]))
    for series, (length, group) in enumerate(lengths.items()):
        for side, other, sign in (("a", "b", 1), ("b", "a", -1)):
            chosen = group.by(itemgetter(f"{other}_sinks")).get(base)
            if chosen:
                ordered = chosen.ordered(itemgetter(f"{side}_sinks"))
                fields: Spec = {"x": f"{side}_sinks", "y": "delta_nats", "sign": sign, **CI95}
                name = f"N = {length:,}"
                traces.append(points(ordered, name, Look.of(series), mode=mode, unit=" nats", **fields))
    words = f"{base}+(N-{base})" if base else "0+N"
    most = max(x for trace in traces for x in trace["x"])
    x = axis("first tokens kept, x", range=[-0.04 * most - 0.1, 1.04 * most + 0.1], dtick=1 + most // 10)
    y = axis(f"nats above {words}", zeroline=True)
    caption = f"{model} on {text}: loss at x+(N-x) minus loss at {words}; {OVER_TEXT}; own scale"
    at_base = {"x": base, "y": 0, "text": words, "yanchor": "bottom"}
    return Figure(f"gap/{text}/{model}", caption, traces, layout(x, y, 280, annotations=[at_base]))


def _shared_sinks(pairs: Source) -> int:
    """The number of kept tokens that most pairs have on a side; the fewest of several."""
    counts = Counter(int(side["sinks"]) for pair in pairs.rows for side in wording.sides(pair))
    return min(counts, key=lambda sinks: (-counts[sinks], sinks))
