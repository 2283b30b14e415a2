"""How the page and its pictures look in light and in dark, and the few lines with which its tables are sorted."""

from __future__ import annotations

__all__ = ["PICTURE_STYLE", "SCRIPT", "STYLE"]

# The colors are those of Okabe and Ito, which people who can't tell red from green still tell apart; lighter in dark.
_COLORS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --quiet: #59636e; --line: #d8dee4; --soft: #f4f6f8;
  --blue: #0072b2; --orange: #e69f00; --green: #009e73; --red: #d55e00; --purple: #cc79a7; --sky: #56b4e9;
  --gray: #8b949e; --wrong: #a84300; --good: #00684b; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ed; --quiet: #9aa4ae; --line: #343b43;
  --soft: #1e2329; --blue: #4a9fd8; --orange: #e9ad2e; --green: #2bb58d; --red: #f07c2d; --purple: #d992b9;
  --sky: #8accf2; --gray: #7d8790; --wrong: #ff9a57; --good: #4fd0a8; } }
"""

_PAGE = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; font-size: 1.15rem; }
header p { margin: .3rem 0 0; color: var(--quiet); font-size: .85rem; overflow-wrap: anywhere; }
.caption { margin: -.3rem 0 .6rem; color: var(--quiet); font-size: .85rem; }
p { margin: .4rem 0; overflow-wrap: anywhere; }
ul { margin: .4rem 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
pre { margin: .6rem 0; padding: .7rem .9rem; background: var(--soft); border: 1px solid var(--line);
  border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font: .85rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { width: 100%; border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { background: var(--soft); vertical-align: top; }
thead small { display: block; min-height: 1.3em; color: var(--quiet); font-weight: normal; }
th:first-child { position: sticky; left: 0; background: var(--paper); text-align: left; font-weight: normal;
  min-width: 11rem; max-width: 21rem; white-space: normal; overflow-wrap: anywhere; }
thead th:first-child { background: var(--soft); font-weight: bold; }
thead button { padding: 0; border: 0; background: none; color: inherit; font: inherit; cursor: pointer;
  text-align: inherit; }
th[aria-sort=ascending] small::after { content: " \\25B2"; }
th[aria-sort=descending] small::after { content: " \\25BC"; }
.failure { text-align: left; color: var(--wrong); white-space: normal; overflow-wrap: anywhere; }
.mark { white-space: nowrap; font-weight: bold; }
.best .mark { color: var(--good); }
.wrong .mark { color: var(--wrong); }
.unsure .mark { color: var(--quiet); }
figure { margin: 0; overflow-x: auto; }
svg { display: block; width: 100%; min-width: 46rem; height: auto; }
@media print { body { max-width: none; } .wide, figure { overflow: visible; } }
"""

_DRAWINGS = """
svg text { fill: var(--ink); font-size: 12px; stroke: var(--paper); stroke-width: 3px; paint-order: stroke; }
svg .quiet { fill: var(--quiet); }
svg .small { font-size: 10px; }
svg rect, svg path { fill: var(--color, none); }
.blue { --color: var(--blue); } .orange { --color: var(--orange); } .green { --color: var(--green); }
.red { --color: var(--red); } .purple { --color: var(--purple); } .sky { --color: var(--sky); }
.gray { --color: var(--gray); } .ink { --color: var(--ink); }
svg .outlined { stroke: var(--red); }
svg .grid { stroke: var(--line); }
svg .whisker { stroke: var(--ink); stroke-width: 1.5; fill: none; }
svg .hatching { stroke: var(--red); stroke-width: 3; }
svg .dashed { stroke: var(--quiet); stroke-dasharray: 5 4; fill: none; }
svg .line { stroke: var(--color); stroke-width: 2; fill: none; }
svg .dots { stroke: var(--orange); stroke-width: 3.5; stroke-linecap: round; stroke-opacity: .55; }
svg .median { stroke: var(--ink); stroke-width: 2; }
"""

STYLE = _COLORS + _PAGE + _DRAWINGS
# Of a picture by itself.
PICTURE_STYLE = (
    _COLORS + 'svg { background: var(--paper); font-family: system-ui, "DejaVu Sans", sans-serif; }' + _DRAWINGS
)

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending" || (place === 0 && !head.hasAttribute("aria-sort"));
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = row => {
        const cell = row.cells[place];
        if (place === 0) return cell.textContent;
        return cell && cell.dataset.value !== undefined ? Number(cell.dataset.value.replace("inf", "Infinity")) : null;
      };
      const order = (one, other) => {
        if (one === null || other === null) return (one === null) - (other === null);
        return (one < other ? -1 : one > other ? 1 : 0) * (up ? 1 : -1);
      };
      body.append(...[...body.rows].sort((one, other) => order(key(one), key(other))));
    });
  });
}
"""
