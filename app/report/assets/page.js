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

const nearest = (values, wanted) =>
  values.reduce((best, value, index) => (Math.abs(value - wanted) < Math.abs(values[best] - wanted) ? index : best), 0);
const text = ({ name, y, low, high }) => `${name} ${y ?? "–"}${low === undefined ? "" : ` (${low} to ${high})`}`;

for (const figure of document.querySelectorAll("figure")) {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const picture = figure.querySelector(".picture");
  // the interpreter of expressions, because the page's policy forbids code from strings
  const options = { ast: true, renderer: "svg", actions: false, defaultStyle: false };
  window.vegaEmbed(picture, spec, options).then(({ view }) => {
    if (!figure.dataset.reads) return;
    // a curve's rows by its name; the first curve says where the cursor can be
    const rows = [spec, ...spec.layer].flatMap((part) => part.data?.values ?? []).filter((row) => row.name);
    const curves = Object.values(Object.groupBy(rows, (row) => row.name));
    const points = curves[0].map((row) => row.x);
    const output = figure.querySelector("output");
    let index = points.length - 1;
    const show = (at) => {
      index = at;
      view.signal("at", points[at]).run();
      const read = curves.map((curve) => curve[nearest(curve.map((row) => row.x), points[at])]);
      output.textContent = `${figure.dataset.reads} ${Number(points[at].toPrecision(4))}: ${read.map(text).join(" · ")}`;
    };
    figure.addEventListener("pointermove", (event) => {
      const pixel = event.clientX - picture.getBoundingClientRect().left - view.origin()[0];
      show(nearest(points, view.scale("x").invert(pixel)));
    });
    figure.addEventListener("keydown", (event) => {
      const stride = event.shiftKey ? Math.max(1, Math.round(points.length / 20)) : 1;
      const moves = { ArrowLeft: index - stride, ArrowRight: index + stride, Home: 0, End: points.length - 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      show(Math.min(Math.max(moves[event.key], 0), points.length - 1));
    });
  });
}
