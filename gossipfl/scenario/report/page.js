"use strict";
// Draws a plot when it comes into view, in the colours of the page.
const plots = JSON.parse(document.getElementById("plots").textContent);
const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = () => innerWidth < 600;

function colours() {
  const style = getComputedStyle(root);
  const of = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: of("--rule"), zerolinecolor: of("--rule"), linecolor: of("--rule") };
  return { ink: of("--ink"), card: of("--card"), axis };
}

function layoutOf(spec) {
  const { ink, card, axis } = colours();
  return {
    margin: { l: 48, r: 12, t: (narrow() ? 12 : 30) + (spec.layout.showlegend ? 22 : 0), b: 44 }, // the icons are above all
    height: 320,
    hovermode: "x unified",
    legend: { orientation: "h", traceorder: "normal", y: 1.02, yanchor: "bottom", x: 0 },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // or a finger could not scroll past a plot
    ...spec.layout,
    font: { color: ink, size: narrow() ? 11 : 12, family: "system-ui, sans-serif" },
    hoverlabel: { bgcolor: card, font: { color: ink } },
    paper_bgcolor: card,
    plot_bgcolor: card,
    xaxis: { ...axis, ...spec.layout.xaxis },
    yaxis: { ...axis, ...spec.layout.yaxis },
  };
}

const settings = {
  responsive: true,
  displaylogo: false,
  displayModeBar: narrow() ? false : "hover",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
};
const drawn = new Set();
const hidden = new Set(); // runs, by the place in the legend
const draw = (element) => {
  const spec = plots[element.dataset.plot];
  drawn.add(element);
  const data = spec.data.map((trace) => ({ ...trace, visible: !hidden.has(trace.legendgroup) }));
  Plotly.react(element, data, layoutOf(spec), settings);
};
const watcher = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting) {
      watcher.unobserve(target);
      draw(target);
    }
  }
}, { rootMargin: "300px" });

function setTheme(theme) {
  root.dataset.theme = theme;
  drawn.forEach(draw);
}
setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
document.querySelectorAll("[data-group]").forEach((button) => button.addEventListener("click", () => {
  const shown = button.getAttribute("aria-pressed") === "true";
  button.setAttribute("aria-pressed", String(!shown));
  hidden[shown ? "add" : "delete"](button.dataset.group);
  drawn.forEach(draw);
}));
addEventListener("beforeprint", () => document.querySelectorAll(".plot").forEach(draw));
document.querySelectorAll(".plot").forEach((element) => watcher.observe(element));
