"""How the report looks: one style sheet, inside the page."""

CSS = """
:root { color-scheme: light; --ink: #1f2933; --muted: #667380; --rule: #dde3e9; --main: #2f6690; --soft: #f5f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 28px 20px 40px; }
h1 { margin: 0 0 8px; font-size: 28px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 40px 0 14px; padding-top: 14px; border-top: 1px solid var(--rule); font-size: 18px; }
h3 { margin: 0 0 6px; font-size: 13px; color: var(--main); }
p { margin: 0 0 12px; }
.lead { max-width: 48em; font-size: 17px; }
.lead b { color: var(--main); }
.meta { margin: 0; color: var(--muted); font-size: 13.5px; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: 8px; color: var(--muted); font-size: 13px; }
figcaption b { color: var(--ink); }
.trio { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 20px; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 32px 40px; align-items: start; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { padding-bottom: 6px; text-align: left; font-weight: 600; }
th { color: var(--muted); font-size: 12.5px; font-weight: 500; text-align: left; white-space: nowrap; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--rule); }
.facts th:nth-child(2), .facts td:nth-child(2) { text-align: right; white-space: nowrap; }
.facts td:first-child { white-space: nowrap; }
.facts td:nth-child(3) { color: var(--muted); font-size: 13.5px; }
.scroll { max-height: 560px; overflow: auto; border: 1px solid var(--rule); border-radius: 6px; }
.layers { font-size: 13px; }
.layers thead th { position: sticky; top: 0; background: var(--soft); box-shadow: inset 0 -1px var(--rule); }
.layers th, .layers td { padding: 4px 12px; white-space: nowrap; }
.layers tbody tr:last-child td { border-bottom: 0; }
.layers tbody tr:hover { background: var(--soft); }
:is(.layers th, .layers td)
  :is(:nth-child(4), :nth-child(7), :nth-child(8), :nth-child(10), :nth-child(11)) { text-align: right; }
code { font: 12.5px/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
footer { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 28px 40px; margin-top: 40px;
  padding-top: 18px; border-top: 1px solid var(--rule); font-size: 12.5px; }
dl { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 2px 14px; margin: 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 720px) {
  main { padding: 20px 16px 32px; }
  h1 { font-size: 23px; }
  .lead { font-size: 16px; }
  .facts td:first-child { white-space: normal; }
  .trio, .pair, footer { grid-template-columns: minmax(0, 1fr); }
}
@media print { .scroll { max-height: none; overflow: visible; border: 0; } }
"""
