"""How the report page looks: type, light and dark, colours that colour-blind readers can tell apart.

Series colours follow Okabe and Ito, "Color Universal Design" (2008), made lighter in the dark; dashes
tell the series apart without any colour.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfcfa; --ink: #22252a; --soft: #636a73; --hair: #dcdad4; --tint: #f3f1ec;
  --s0: #d55e00; --s1: #0072b2; --s2: #009070; --s3: #b65a94; --s4: #6b7078; --s5: #a87400;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #17191c; --ink: #e6e4df; --soft: #a0a5ac; --hair: #363a40; --tint: #202327;
    --s0: #ff8a3d; --s1: #5cb8f0; --s2: #2fc79f; --s3: #e39ac3; --s4: #9aa0a8; --s5: #e6b03c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.55 "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Georgia, serif;
}
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1, h2, h3 { line-height: 1.2; font-weight: 600; text-wrap: balance; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; margin: 0 0 1rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 2.2rem 0 .4rem; }
p, li, dd { max-width: 44rem; overflow-wrap: anywhere; }
.finding { font-size: 1.2rem; line-height: 1.45; margin: .5rem 0; }
.soft, figcaption, small { color: var(--soft); font-size: .92rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table, svg text, .legend { font-family: system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; }
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
.number { text-align: right; }
td small { display: block; font-size: .78rem; }
.charts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.2rem 2.5rem;
}
figure { margin: .6rem 0; max-width: 31rem; min-width: 0; }
figcaption { overflow-wrap: anywhere; margin-bottom: .3rem; }
figure svg { display: block; width: 100%; height: auto; }
.legend {
  display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; padding: 0; margin: .8rem 0 0; list-style: none;
  font-size: .86rem;
}
.sample { width: 28px; height: 10px; margin-right: .45rem; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg text.group { font-size: 12px; font-weight: 600; fill: var(--ink); }
.grid { stroke: var(--hair); stroke-width: .7; }
.axis { stroke: var(--soft); stroke-width: 1; }
.mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
.line { fill: none; stroke: currentColor; stroke-width: 1.4; stroke-linejoin: round; }
.whisker { stroke: currentColor; stroke-width: 2; }
.dot { fill: currentColor; }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); }
.s3 { color: var(--s3); } .s4 { color: var(--s4); } .s5 { color: var(--s5); }
.line.s2 { stroke-dasharray: 6 3; } .line.s3 { stroke-dasharray: 2 2.5; }
.line.s4 { stroke-dasharray: 9 3 2 3; } .line.s5 { stroke-dasharray: 4 2; }
dl { margin: 0; } dt { font-weight: 600; margin-top: .7rem; } dd { margin: 0; }
summary { cursor: pointer; margin-top: 1.5rem; }
@media (max-width: 34rem) {
  main { padding-top: 1.5rem; }
  h1 { font-size: 1.55rem; }
  .finding { font-size: 1.1rem; }
}
"""
