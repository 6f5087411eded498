"use strict";
const root = document.documentElement;
const button = document.getElementById("scheme");
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.style.colorScheme || (system.matches ? "dark" : "light")) === "dark";
const label = () => { button.textContent = isDark() ? "Light colours" : "Dark colours"; };
button.addEventListener("click", () => { root.style.colorScheme = isDark() ? "light" : "dark"; label(); });
system.addEventListener("change", label);
button.hidden = false;
label();

// a line under the pointer, or under the arrow keys, and the values where it stands
const nearest = (values, wanted) =>
  values.reduce((best, value, index) => (Math.abs(value - wanted) < Math.abs(values[best] - wanted) ? index : best), 0);

for (const figure of document.querySelectorAll("figure[data-readout]")) {
  const data = JSON.parse(figure.dataset.readout);
  const svg = figure.querySelector("svg");
  const output = figure.querySelector("output");
  const points = data.series[0].at;
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  line.setAttribute("class", "cursor");
  line.setAttribute("y1", 10);
  line.setAttribute("y2", 208);
  let index = points.length - 1;

  const show = (at) => {
    index = at;
    const x = data.start + ((points[at] - data.low) / (data.high - data.low)) * (data.end - data.start);
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    svg.append(line);
    const parts = data.series.map((series) => {
      const value = series.values[nearest(series.at, points[at])];
      return `${series.name} ${value === null ? "–" : value}`;
    });
    output.textContent = `${data.x} ${Number(points[at].toPrecision(4))}: ${parts.join(" · ")}`;
  };
  figure.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const pixel = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    show(nearest(points, data.low + ((pixel - data.start) / (data.end - data.start)) * (data.high - data.low)));
  });
  figure.addEventListener("keydown", (event) => {
    const stride = event.shiftKey ? Math.max(1, Math.round(points.length / 20)) : 1;
    const moves = { ArrowLeft: index - stride, ArrowRight: index + stride, Home: 0, End: points.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(Math.min(Math.max(moves[event.key], 0), points.length - 1));
  });
}
