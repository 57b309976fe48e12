for (const svg of document.querySelectorAll("svg[data-frame]")) {
  const [left, top, right, bottom, x0, x1, y0, y1] = svg.dataset.frame.split(" ").map(Number);
  const names = svg.closest("figure").querySelectorAll(".legend li");
  const lines = [...svg.querySelectorAll("[data-gid^=line] > path")].map(path => ({
    name: names[path.parentNode.dataset.gid.slice(5)].textContent,
    points: path.getAttribute("d").slice(1).split(/[ML]/).map(pair => pair.split(" ").map(Number)),
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
