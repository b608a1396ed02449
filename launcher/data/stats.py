"""What the stores of a recipe hold, counted: lengths, shares of sources, what is trained, doubled, cut or left out.

All comes from the columns of the stores, which are memory maps; nothing is tokenised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.duplicates import count, record_hashes
from launcher.data.prepare import Prepared
from launcher.data.store import Store
from launcher.recipe.schema import Recipe

VERSION = 1
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_BINS = 24


def statistics(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """What `launcher data stats --json` prints (docs/json.md).

    Args:
        prepared: with stores, so not of a stream.
    """
    train = [(source, Store.open(source["store"])) for source in prepared.train["sources"]]
    sets = [] if prepared.eval is None else [(e, Store.open(e["store"])) for e in prepared.eval["sets"]]
    return {
        "version": VERSION,
        "seq_len": recipe.data.seq_len,
        "packing": recipe.data.packing,
        "train": _together(prepared.train, train) | {"sources": [_source(e, s, prepared.train) for e, s in train]},
        "eval": None
        if prepared.eval is None
        else _together(prepared.eval, sets) | {"sets": [_alone(entry, store) for entry, store in sets]},
        "leaked": prepared.leaked,
    }


def histogram(lengths: Sequence[NDArray[Any]], *, bins: int = _BINS) -> tuple[list[int], list[list[int]]]:
    """Counts by length, in steps of about equal ratio.

    Args:
        lengths: of the documents of each source.
    Returns:
        edges: a bin holds the lengths from one edge to below the next.
        counts: of each source, a number a bin.
    """
    full = [array for array in lengths if array.size]
    if not full:
        return [1, 2], [[0] for _ in lengths]
    low, high = min(int(a.min()) for a in full), max(int(a.max()) for a in full)
    edges = np.unique(np.round(np.geomspace(max(low, 1), high + 1, bins + 1)).astype(np.int64))
    return edges.tolist(), [np.histogram(array, bins=edges)[0].tolist() for array in lengths]


def draw(found: dict[str, Any], prepared: Prepared, path: Path) -> None:
    """A picture of the training documents: how long they are, and how many tokens each source has.

    Raises:
        OSError: `path` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sources = found["train"]["sources"]
    edges, counts = histogram([np.asarray(Store.open(e["store"]).index.length) for e in prepared.train["sources"]])
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    bottom = np.zeros(len(edges) - 1)
    for source, heights in zip(sources, counts, strict=True):
        left.bar(edges[:-1], heights, np.diff(edges), bottom=bottom, align="edge", label=source["name"], linewidth=0)
        bottom += heights
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    left.yaxis.get_major_locator().set_params(integer=True)
    left.axvline(found["train"]["lengths"]["p50"], color="black", linestyle=":", linewidth=1, label="median")
    left.set(xlabel="tokens of a document", ylabel="documents", title="Lengths")
    left.legend(frameon=False, fontsize="small")
    names = [source["name"] for source in sources]
    trained = np.array([source["trained_tokens"] for source in sources])
    read = np.array([source["tokens"] for source in sources]) - trained
    right.barh(names, trained, color="#22965a", label="trained")
    right.barh(names, read, left=trained, color="#c9ced6", label="read only")
    right.xaxis.set_major_formatter(_short)
    right.invert_yaxis()
    right.set(xlabel="tokens", title="Tokens per source")
    right.legend(frameon=False, fontsize="small", ncols=2, loc="upper right", bbox_to_anchor=(1, -0.12))
    for side in (left, right):
        side.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _together(entry: dict[str, Any], stores: Sequence[tuple[dict[str, Any], Store]]) -> dict[str, Any]:
    return _counts(entry, [store for _, store in stores])


def _source(entry: dict[str, Any], store: Store, train: dict[str, Any]) -> dict[str, Any]:
    """A source of training also has a share of the epoch, and a number of times that the epoch sees it."""
    seen = entry["epoch_rows"] / entry["rows"] if entry["rows"] else 0.0
    return _alone(entry, store) | {"epoch_rows": entry["epoch_rows"], "epochs": seen, "share": entry["share"]}


def _alone(entry: dict[str, Any], store: Store) -> dict[str, Any]:
    named = {key: entry[key] for key in ("name", "path", "format") if key in entry}
    return named | _counts(entry, [store])


def _counts(entry: dict[str, Any], stores: Sequence[Store]) -> dict[str, Any]:
    lengths = np.concatenate([np.asarray(store.index.length) for store in stores])
    edges, (counts,) = histogram([lengths])
    tokens, trained = entry["tokens"], entry["trained_tokens"]
    return {
        "rows": entry["rows"],
        "documents": entry["documents"],
        "tokens": tokens,
        "trained_tokens": trained,
        "trained_share": trained / tokens if tokens else 0.0,
        "packing_efficiency": entry["packing_efficiency"],
        "groups": entry["groups"],
        "duplicates": count([record_hashes(store) for store in stores], {}).within,
        "dropped": entry["dropped"],
        "changed": entry["changed"],
        "lengths": _lengths(lengths),
        "histogram": {"edges": edges, "documents": counts},
    }


def _lengths(lengths: NDArray[Any]) -> dict[str, Any]:
    if not lengths.size:
        return {}
    percentiles = np.percentile(lengths, _PERCENTILES, method="lower").astype(int).tolist()
    named = {f"p{p}": value for p, value in zip(_PERCENTILES, percentiles, strict=True)}
    return {"mean": float(lengths.mean()), "min": int(lengths.min()), **named, "max": int(lengths.max())}


def _short(value: float, _: object = None) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
