"""How the report page looks: type, light and dark, colours that colour-blind readers can tell apart.

Series colours follow Okabe and Ito, "Color Universal Design" (2008), made lighter in the dark; symbols and
dashes tell the series apart without any colour. Heat maps grow in lightness alone (``--h0`` to ``--h4``), or
from orange by a neutral middle to blue (``--d0`` to ``--d4``). Paper is always light.
"""

# fmt: off
LIGHT = {
    "paper": "#fdfcfa", "ink": "#22252a", "soft": "#636a73", "hair": "#e2e0da", "tint": "#f3f1ec",
    "s0": "#d55e00", "s1": "#0072b2", "s2": "#009070", "s3": "#b65a94", "s4": "#6b7078", "s5": "#a87400",
    "h0": "#f0eee8", "h1": "#bed3e3", "h2": "#76a9cf", "h3": "#2b77b0", "h4": "#0b3a63",
    "d0": "#a84a00", "d1": "#e6a56b", "d2": "#f0eee8", "d3": "#7fb0d6", "d4": "#0b4f86",
}
DARK = {
    "paper": "#17191c", "ink": "#e6e4df", "soft": "#a0a5ac", "hair": "#33373c", "tint": "#202327",
    "s0": "#ff8a3d", "s1": "#5cb8f0", "s2": "#2fc79f", "s3": "#e39ac3", "s4": "#9aa0a8", "s5": "#e6b03c",
    "h0": "#22262b", "h1": "#23465f", "h2": "#2f78a8", "h3": "#6cb4df", "h4": "#d9edfa",
    "d0": "#ff9a4d", "d1": "#a25a1f", "d2": "#22262b", "d3": "#2b6c9c", "d4": "#7cc4f5",
}
# fmt: on


def _named(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


STYLE = (
    f"""
:root {{ color-scheme: light dark; {_named(LIGHT)} }}
@media screen and (prefers-color-scheme: dark) {{ :root:not(.printed) {{ {_named(DARK)} }} }}
"""
    + """\
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.55 "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Georgia, serif;
}
main { max-width: 66rem; margin: 0 auto; padding: 2.75rem 1.25rem 4rem; }
h1, h2, h3 { line-height: 1.2; font-weight: 600; text-wrap: balance; overflow-wrap: anywhere; }
h1 { font-size: 1.95rem; margin: 0 0 1.1rem; }
h2 { font-size: 1.4rem; margin: 3.4rem 0 .5rem; padding-top: 1.1rem; border-top: 1px solid var(--hair); }
h3 { font-size: 1.08rem; margin: 2.2rem 0 .4rem; }
p, li, dd { max-width: 44rem; overflow-wrap: anywhere; }
.finding { font-size: 1.2rem; line-height: 1.45; margin: .55rem 0; }
.soft, figcaption, small { color: var(--soft); font-size: .92rem; }
.soft { margin: .3rem 0 .8rem; }
nav, table, summary, pre, .kicker {
  font-family: system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif;
}
.kicker { color: var(--soft); font-size: .82rem; letter-spacing: .04em; margin: 0 0 .5rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin-top: 1.6rem; font-size: .86rem; }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: .2em; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .86rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td {
  padding: .45rem 1.1rem .45rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--hair);
}
td { white-space: nowrap; }
td:last-child:not(.number) { white-space: normal; min-width: 11rem; overflow-wrap: anywhere; }
th { font-weight: 600; }
tbody th { min-width: 8.5rem; max-width: 18rem; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 500; white-space: nowrap; border-bottom-color: var(--soft); }
.number, .numbers td, .numbers th + th { text-align: right; }
td small { display: block; font-size: .78rem; }
.plots {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.4rem 2.5rem;
  margin: 1rem 0;
}
.plots figure:only-child { max-width: 46rem; }
figure { margin: 0; min-width: 0; }
figcaption { overflow-wrap: anywhere; line-height: 1.35; margin-bottom: .3rem; }
.plot { min-width: 0; overflow: hidden; }
.plot .modebar { opacity: 0; }
.plot:is(:hover, :focus-within) .modebar { opacity: 1; }
figure summary, .scroll table { font-size: .82rem; }
figure .scroll { max-height: 24rem; overflow: auto; }
details { margin: .4rem 0; }
summary { cursor: pointer; color: var(--soft); font-size: .86rem; }
pre {
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .84rem; line-height: 1.5;
  background: var(--tint); padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
}
dl { margin: 0; } dt { font-weight: 600; margin-top: .7rem; } dd { margin: 0; }
@media (max-width: 34rem) {
  main { padding-top: 1.5rem; }
  h1 { font-size: 1.55rem; }
  .finding { font-size: 1.1rem; }
}
@media print {
  main { max-width: none; padding: 0; }
  nav { display: none; }
  .plots { display: block; }
  .scroll, figure .scroll { overflow: visible; max-height: none; }
  table { font-size: .68rem; }
  figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
)
