"""The look of the page, and the read-out that follows the pointer over a chart."""

from noctule.report.palette import COLORS, COLORS_DARK, INK, INK_DARK, variables

_SERIES = "".join(f".c{place}{{--c:var(--c{place})}}" for place in range(len(COLORS)))

STYLE = f"""
:root{{color-scheme:light dark;{variables(INK, COLORS)}}}
@media (prefers-color-scheme:dark){{:root{{{variables(INK_DARK, COLORS_DARK)}}}}}
{_SERIES}
*{{box-sizing:border-box}}
body{{margin:0 auto;max-width:62rem;padding:clamp(1.25rem,5vw,4rem) clamp(1rem,4vw,2.5rem);background:var(--page);
color:var(--ink);font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
-webkit-text-size-adjust:100%;overflow-wrap:anywhere}}
header{{margin-bottom:3rem}}
.kind{{margin:0 0 .75rem;color:var(--accent);font-weight:600;font-size:.9375rem}}
h1{{margin:0;font-size:clamp(1.375rem,1.1rem + 1.5vw,2rem);line-height:1.25;font-weight:650;
letter-spacing:-.015em;text-wrap:balance;overflow-wrap:break-word}}
.facts{{margin:1rem 0 0;color:var(--soft);font-size:.9375rem}}
.facts span,pre span{{display:inline-block;max-width:100%}}
.facts span+span::before{{content:" · ";white-space:pre}}
h2{{margin:3.25rem 0 1rem;font-size:1.25rem;line-height:1.3;font-weight:650;letter-spacing:-.005em}}
p{{max-width:44rem}}
.note{{color:var(--soft);font-size:.875rem}}
.grid2{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:2.25rem 2.5rem}}
figure{{margin:0;min-width:0}}
figcaption,caption{{font-weight:600;font-size:.9375rem;text-align:left;padding-bottom:.375rem}}
.legend{{display:flex;flex-wrap:wrap;gap:.125rem .75rem;margin:0 0 .5rem;padding:0;list-style:none;
font-size:.8125rem;color:var(--soft)}}
.legend li{{display:flex;align-items:center;gap:.4rem}}
.swatch{{width:1.25rem;height:.5rem;flex:none}}
.plot{{position:relative}}
.chart svg[role]{{display:block;width:100%;height:auto;overflow:visible;touch-action:pan-y}}
.chart svg text{{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}}
.chart svg .name{{fill:var(--ink)}}
.grid{{stroke:var(--line);stroke-width:1}}
.tick{{stroke:var(--soft);stroke-width:1}}
.line{{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}}
.dashed{{stroke-dasharray:5 4}}
.dotted{{stroke-dasharray:.1 4}}
circle{{fill:var(--c)}}
.bar{{fill:var(--c)}}
.track{{fill:var(--line)}}
.rule{{stroke:var(--soft);stroke-width:1;visibility:hidden}}
.readout{{position:absolute;top:0;z-index:1;padding:.4rem .6rem;border:1px solid var(--line);border-radius:.375rem;
background:var(--page);font-size:.8125rem;line-height:1.45;pointer-events:none;width:max-content;
font-variant-numeric:tabular-nums}}
.scroll{{overflow-x:auto}}
.scroll+.scroll,.note+.grid2{{margin-top:2rem}}
table{{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;overflow-wrap:normal}}
th,td{{padding:.45rem 0 .45rem 1rem;text-align:right;vertical-align:baseline;border-bottom:1px solid var(--line)}}
th:first-child{{padding-left:0;text-align:left;font-weight:400}}
thead th{{color:var(--soft);font-size:.875rem;font-weight:600;border-bottom-color:var(--soft)}}
thead th:first-child{{font-weight:600}}
tbody td{{white-space:nowrap}}
tr.total>*{{font-weight:600}}
.part>th:first-child{{padding-left:1rem}}
td.none{{color:var(--soft);white-space:normal}}
td.worse{{color:var(--c1)}}
dl{{display:grid;grid-template-columns:minmax(7rem,max-content) 1fr;gap:.4rem 1.5rem;margin:0}}
dt{{color:var(--soft)}}
dd{{margin:0;min-width:0}}
dd code{{display:block;line-height:1.75}}
tbody .points{{white-space:normal}}
code,pre{{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:.875rem}}
pre{{margin:.25rem 0 1.5rem;padding:.875rem 1rem;background:var(--panel);border:1px solid var(--line);
border-radius:.5rem;white-space:pre-wrap}}
footer{{margin-top:3.5rem;color:var(--soft);font-size:.875rem}}
:focus-visible{{outline:2px solid var(--accent);outline-offset:2px}}
@media (max-width:32rem){{th,td{{padding-left:.5rem;font-size:.875rem}}.part>th:first-child{{padding-left:.75rem}}
.plot text{{font-size:13.5px!important}}dl{{grid-template-columns:1fr;gap:0}}dd{{margin-bottom:.6rem}}}}
@media print{{body{{max-width:none;padding:0}}figure,tr{{break-inside:avoid}}}}
""".strip()

SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-frame]")) {
  const [left, top, right, bottom, x0, x1, y0, y1] = svg.dataset.frame.split(" ").map(Number);
  const lines = [...svg.querySelectorAll("path[data-name]")].map(path => ({
    name: path.dataset.name,
    points: path.getAttribute("d").slice(1).split(/[ML]/).map(pair => pair.split(",").map(Number)),
  }));
  const title = svg.querySelector("title");
  svg.setAttribute("aria-label", title.textContent);
  title.remove();  // its own tooltip would lie over the read-out
  const rule = svg.querySelector(".rule"), box = svg.parentNode.querySelector(".readout");
  const near = (points, x) => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
  const row = words => box.appendChild(document.createElement("div")).textContent = words;
  const words = y => Math.abs(y) < 1e9 ? y.toLocaleString("en", {maximumSignificantDigits: 4}) : y.toExponential(2);
  svg.addEventListener("pointermove", event => {
    const pointer = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const x = near(lines.flatMap(line => line.points), pointer)[0];
    const value = x0 + (x - left) / (right - left) * (x1 - x0);
    box.replaceChildren();
    row(svg.dataset.x + ": " + words(svg.dataset.whole == "1" ? Math.round(value) : value));
    for (const line of lines) {
      const point = near(line.points, x);
      if (Math.abs(point[0] - x) > 4) continue;
      const y = y1 - (point[1] - top) / (bottom - top) * (y1 - y0);
      row(line.name + ": " + words(y) + svg.dataset.unit);
    }
    rule.setAttribute("x1", x); rule.setAttribute("x2", x); rule.style.visibility = "visible";
    box.hidden = false;
    const at = x / svg.viewBox.baseVal.width * 100;
    box.style.left = at < 50 ? at + 3 + "%" : ""; box.style.right = at < 50 ? "" : 103 - at + "%";
    box.style.maxWidth = Math.max(at, 100 - at) - 3 + "%";
  });
  svg.addEventListener("pointerleave", () => { rule.style.visibility = "hidden"; box.hidden = true; });
}
""".strip()
