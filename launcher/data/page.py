"""Rows as one HTML page that needs no network and runs no script: every text in it is escaped, styles are its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from launcher.data.preview import pieces, visible

_HUES = (212, 28, 275, 165, 340, 95, 190, 50)  # of sources, in their order
_STYLE = """
:root{--back:#f6f7f9;--card:#fff;--ink:#1c2330;--quiet:#667085;--line:#dfe3ea;--learn:34,150,83;--bad:#b42318;--good:#067647}
@media(prefers-color-scheme:dark){:root{--back:#11151c;--card:#1a202a;--ink:#e4e8ef;--quiet:#94a0b3;--line:#2e3746;
--learn:52,190,110;--bad:#ff8a7a;--good:#5fd39a}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,sans-serif;padding:28px 20px 72px}
main{max-width:1080px;margin:auto}
h1{font-size:22px;margin:0 0 2px}h2{font-size:16px;margin:0}
p,dl,dd,ul{margin:0;padding:0}.quiet{color:var(--quiet)}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;margin-top:18px;overflow:hidden}
.head{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:baseline;padding:12px 16px;
border-bottom:1px solid var(--line)}
.counts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));padding:14px 16px;gap:12px}
.counts dt{color:var(--quiet);font-size:13px}.counts dd{font-size:19px;font-variant-numeric:tabular-nums}
ul.said{list-style:none;padding:0 16px 14px;font-size:14px}.warn{color:var(--bad)}
.legend{display:flex;flex-wrap:wrap;gap:8px 18px;margin-top:14px;font-size:14px;align-items:center}
.bar{display:flex;height:10px;background:repeating-linear-gradient(135deg,var(--line) 0 2px,transparent 2px 6px)}
.bar i{display:block;background:hsl(var(--hue) 62% 52%);border-right:2px solid var(--card);min-width:2px}
article{padding:10px 16px 14px;border-top:2px dashed var(--line);border-left:5px solid hsl(var(--hue) 62% 52%)}
article:first-of-type{border-top:0}
article.rejected,article.bad{--learn:214,69,56}
article>header{display:flex;flex-wrap:wrap;gap:2px 12px;font-size:13px;margin-bottom:6px;align-items:baseline}
.dot{display:inline-block;width:9px;height:9px;border-radius:50%;background:hsl(var(--hue) 62% 52%);margin-right:6px}
.side{border:1px solid currentColor;border-radius:99px;padding:0 9px;font-weight:600}
.chosen,.good{color:var(--good)}.rejected,.bad{color:var(--bad)}
pre{margin:0;font:13.5px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,"Noto Sans Mono",monospace;
white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;tab-size:4}
pre b,.legend b{font-weight:400;border-radius:3px;padding:1px 0;box-shadow:inset -1px 0 var(--card)}
pre b{cursor:default;box-shadow:inset -1px 0 var(--line)}
.t{background:rgba(var(--learn),calc(.06 + .22*var(--w,1)));
border-bottom:2px solid rgba(var(--learn),calc(.2 + .6*var(--w,1)))}
.s{border:1px solid var(--line);border-radius:5px;padding:0 3px;color:var(--quiet);font-size:12px}
.s.t{color:inherit;border-color:rgba(var(--learn),.8)}
.n{color:var(--quiet);opacity:.55}
pre b:hover{outline:2px solid hsl(212 70% 55%);outline-offset:1px}
pre b:hover::after{content:attr(data-t);position:fixed;left:50%;bottom:18px;transform:translateX(-50%);max-width:92vw;
background:var(--ink);color:var(--card);font:13px/1.5 ui-monospace,monospace;padding:7px 16px;border-radius:8px;
box-shadow:0 4px 18px #0005;white-space:pre;overflow:hidden;text-overflow:ellipsis;z-index:9}
.legend .t,.legend .s{font:13px ui-monospace,monospace;padding:1px 5px}
"""


def page(shown: dict[str, Any], *, name: str) -> str:
    """The page as text.

    Args:
        shown: what `preview` gives.
        name: of the recipe, for the heading.
    """
    sources = sorted({document["source"] for row in shown["rows"] for document in row["documents"]})
    hues = {source: _HUES[i % len(_HUES)] for i, source in enumerate(sources)}
    heaviest = max((t["weight"] for r in shown["rows"] for d in r["documents"] for t in d["tokens"]), default=1.0)
    scale = 1 / max(heaviest, 1.0)
    rows = "".join(_row(row, hues, scale, seq_len=shown["stats"]["seq_len"]) for row in shown["rows"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(name)}: rows as tokens</title><style>{_STYLE}</style></head>\n<body><main>"
        f'<h1>{escape(name)}</h1><p class="quiet">The first {len(shown["rows"])} rows of training, as tokens.</p>'
        f"{_counts(shown['stats'])}{_legend(shown, scale)}\n{rows}</main></body></html>\n"
    )


def _counts(stats: dict[str, Any]) -> str:
    cells = [("rows", f"streamed, of {stats['seq_len']:,}")] if stats.get("streaming") else _cells(stats)
    told = [("", line) for line in stats["formats"]] + [("warn", line) for line in stats["warnings"]]
    for what in ("dropped", "changed"):
        told += [("warn", f"{what}: {count:,} ({reason})") for reason, count in stats.get(what, {}).items()]
    counts = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>" for what, value in cells)
    said = "".join(f'<li class="{kind or "quiet"}">{escape(line)}</li>' for kind, line in told)
    return f'<section class="card"><dl class="counts">{counts}</dl><ul class="said">{said}</ul></section>'


def _cells(stats: dict[str, Any]) -> list[tuple[str, str]]:
    share = stats["trained_tokens"] / stats["tokens"] if stats["tokens"] else 0.0
    kinds = [f"{stats['groups'][kind]:,} {kind}" for kind in ("pairs", "labelled") if stats["groups"][kind]]
    return [
        ("rows", f"{stats['rows']:,} x {stats['seq_len']:,}"),
        ("documents", f"{stats['documents']:,}"),
        ("tokens", f"{stats['tokens']:,}"),
        ("trained", f"{share:.1%}"),
        ("packing efficiency", f"{stats['packing_efficiency']:.2%}"),
        *([("of the records", ", ".join(kinds))] if kinds else []),
    ]


def _legend(shown: dict[str, Any], scale: float) -> str:
    """What the marks mean, and each weight that occurs."""
    tokens = [t for row in shown["rows"] for document in row["documents"] for t in document["tokens"]]
    weights = sorted({token["weight"] for token in tokens if token["trained"]})
    some = weights if len(weights) <= 6 else [weights[0], weights[len(weights) // 2], weights[-1]]
    factors = [(weight * scale, "" if weight == 1 else f" x{weight:g}") for weight in some]
    trained = "".join(
        f'<span><b class="t" style="--w:{share:.2f}">trained</b>{factor}</span>' for share, factor in factors
    )
    return (
        f'<div class="legend"><span class="quiet">Legend</span>{trained}<span><b>context</b> read, not trained</span>'
        '<span><b class="s">&lt;token&gt;</b> special</span><span><b class="n">&#x21b5;</b> newline</span>'
        '<span class="quiet">Point at a token for its id and weight.</span></div>'
    )


def _row(row: dict[str, Any], hues: dict[str, int], scale: float, *, seq_len: int) -> str:
    documents = row["documents"]
    tokens = sum(len(document["tokens"]) for document in documents)
    bar = "".join(
        f'<i style="--hue:{hues[d["source"]]};width:{100 * len(d["tokens"]) / seq_len:.3f}%"></i>' for d in documents
    )
    return (
        f'<section class="card"><div class="head"><h2>row {row["row"]}</h2><span>{escape(row["source"])}</span>'
        f'<span class="quiet">{tokens:,} of {seq_len:,} tokens, {_many(len(documents), "document")}</span></div>'
        f'<div class="bar">{bar}</div>{"".join(_document(d, hues[d["source"]], scale) for d in documents)}</section>\n'
    )


def _document(document: dict[str, Any], hue: int, scale: float) -> str:
    side = document["side"]
    label = "" if side == "plain" else f'<span class="side {side}">{side}</span>'
    trained = sum(token["trained"] for token in document["tokens"])
    body = "".join(_piece(piece, scale) for piece in pieces(document["tokens"]))
    return (
        f'<article class="{side}" style="--hue:{hue}"><header>'
        f'<span><i class="dot"></i>{_file(document["source"])}</span>'
        f"<span>record {document['record']}</span>{label}"
        f'<span class="quiet">{_many(len(document["tokens"]), "token")}, {trained:,} trained</span></header>'
        f'<pre dir="auto">{body}</pre></article>'
    )


def _piece(piece: Sequence[dict[str, Any]], scale: float) -> str:
    """One token, or those that make a character together; line breaks are real ones, with a mark."""
    text, weight = piece[0]["text"], max(token["weight"] for token in piece)
    kinds = [kind for kind, holds in (("t", weight), ("s", piece[0]["special"])) if holds]
    style = f' style="--w:{weight * scale:.2f}"' if weight and weight * scale != 1 else ""
    name = f' class="{" ".join(kinds)}"' if kinds else ""
    return f'<b{name}{style} data-t="{escape(_told(piece))}">{"".join(_characters(text))}</b>'


def _told(piece: Sequence[dict[str, Any]]) -> str:
    ids = " ".join(str(token["id"]) for token in piece)
    weights = sorted({token["weight"] for token in piece})
    weight = " ".join(f"{w:g}" for w in weights)
    text = visible(piece[0]["text"], newline="\u21b5")
    learnt = f"trained, weight {weight}" if weights[-1] else "not trained"
    return f"{'ids' if len(piece) > 1 else 'id'} {ids}   '{text}'   {learnt}"


def _characters(text: str) -> Iterator[str]:
    *whole, last = text.split("\n")
    for line in whole:
        yield f'{escape(visible(line))}<span class="n">&#x21b5;</span>\n'
    yield escape(visible(last))


def _file(path: str) -> str:
    """A file by its name; where it lies is told when it is pointed at."""
    return f'<span title="{escape(path)}">{escape(path.rstrip("/").rpartition("/")[2])}</span>'


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
