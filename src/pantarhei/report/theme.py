"""The style sheet of pages: light and dark, wide and narrow, on paper too."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfbf9; --card: #ffffff; --ink: #1c2530; --soft: #5b6773; --line: #e3e6ea; --stripe: #f5f6f7;
  --accent: #0072b2; --wash: linear-gradient(120deg, #e7f1f8, #eef6f1 55%, #fbf3ea);
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12161b; --card: #1a2027; --ink: #e4e9ee; --soft: #9aa6b2; --line: #2c343d; --stripe: #1f262e;
    --accent: #6db9e8; --wash: linear-gradient(120deg, #142431, #16261f 55%, #2a2218);
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
header { background: var(--wash); border-bottom: 1px solid var(--line); }
header > div, main, footer { max-width: 66rem; margin: 0 auto; padding: 0 1.5rem; }
header > div { padding-block: 3.2rem 2.4rem; }
h1 { font-size: clamp(1.7rem, 1.2rem + 2.4vw, 2.6rem); line-height: 1.15; letter-spacing: -.02em; margin: 0; }
header p { color: var(--soft); font-size: 1.08rem; margin: .7rem 0 0; max-width: 46rem; text-wrap: pretty; }
nav { display: flex; flex-wrap: wrap; gap: .45rem; margin-top: 1.5rem; }
nav a {
  font-size: .86rem; color: var(--ink); text-decoration: none; padding: .22rem .8rem; border-radius: 99px;
  border: 1px solid var(--line); background: var(--card);
}
nav a:hover, nav a:focus-visible { border-color: var(--accent); color: var(--accent); }
main { padding-block: 1rem 3rem; }
h2 { font-size: 1.42rem; line-height: 1.25; letter-spacing: -.01em; margin: 2.8rem 0 .8rem; scroll-margin-top: 1rem; }
h3 { font-size: 1.08rem; margin: 2rem 0 .5rem; scroll-margin-top: 1rem; }
p { max-width: 46rem; margin: .7rem 0; text-wrap: pretty; }
code, pre { font: .9em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre {
  background: var(--stripe); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; overflow-x: auto;
}
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
dl.facts > div {
  display: flex; flex-direction: column-reverse; justify-content: flex-end; background: var(--card);
  border: 1px solid var(--line); border-radius: 12px; padding: .9rem 1.1rem;
}
dl.facts dt { color: var(--soft); font-size: .86rem; line-height: 1.35; }
dl.facts dd small { font-size: .86rem; font-weight: 400; letter-spacing: 0; color: var(--soft); white-space: nowrap; }
dl.facts dd { margin: 0; font-size: 1.55rem; font-weight: 600; letter-spacing: -.02em; }
.scroll {
  overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 12px;
}
table { border-collapse: collapse; width: 100%; font-size: .94rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem 1rem; text-align: left; white-space: nowrap; }
th { font-weight: 600; font-size: .84rem; color: var(--soft); border-bottom: 1px solid var(--line); }
tbody tr:nth-child(even) { background: var(--stripe); }
.number { text-align: right; }
figure { margin: 1.3rem 0; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 1.1rem; }
.row figure { margin: 0; }
/* Figures keep their white paper in the dark: their inks are made for it. */
figure .frame {
  background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: .7rem;
  width: fit-content; max-width: 100%;
}
figure img { display: block; max-width: 100%; height: auto; }
figure img.pixels { image-rendering: pixelated; }
.row .frame, .row img { width: 100%; }
/* Side by side, grids are made smaller, where whole pixels would come out unequal. */
.row img.pixels { image-rendering: auto; }
figcaption { color: var(--soft); font-size: .88rem; line-height: 1.45; margin-top: .5rem; max-width: 46rem; }
footer { color: var(--soft); font-size: .82rem; padding-block: 1.2rem 2.4rem; border-top: 1px solid var(--line); }
@media (prefers-color-scheme: dark) { figure .frame { filter: brightness(.92); } }
@media (max-width: 40rem) {
  header > div { padding-block: 2rem 1.6rem; }
  th, td { padding: .45rem .7rem; }
}
@media print {
  header { background: none; } nav { display: none; }
  figure, .scroll, dl.facts > div { break-inside: avoid; }
}
"""
