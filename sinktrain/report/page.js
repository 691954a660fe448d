// Draws the page's plots in the page's colours and width, again when either changes.
"use strict";
{
  const CONFIG = {
    displaylogo: false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], // none that sends data anywhere
  };
  const template = JSON.parse(document.querySelector("script[data-template]").textContent);
  const plots = [...document.querySelectorAll("figure > .plot")];
  const PRINTED_WIDTH = 640;
  const LEGEND_LINE = 20;
  const isTouched = matchMedia("(pointer: coarse)").matches;
  let timer = 0;
  let pageWidth = innerWidth;

  // "var(--name)" anywhere in a plot becomes the colour that the page has for it now.
  function coloured(value, style) {
    if (typeof value === "string" && value.startsWith("var(--"))
      return style.getPropertyValue(value.slice(4, -1)).trim();
    if (Array.isArray(value)) return value.map((entry) => coloured(entry, style));
    if (value !== null && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([name, entry]) => [name, coloured(entry, style)]));
    return value;
  }

  function draw(plot, width = plot.clientWidth) {
    const spec = JSON.parse(plot.parentElement.querySelector("script[data-figure]").textContent);
    spec.layout.template = template;
    const { data, layout } = coloured(spec, getComputedStyle(document.documentElement));
    layout.uirevision = "kept"; // what was zoomed stays zoomed
    if (isTouched) layout.dragmode = false; // a finger on a plot scrolls the page
    layout.width = width;
    // the legend takes as many lines as the width asks for: seen only when drawn, at most one for each series
    const most = layout.showlegend === false ? 0 : LEGEND_LINE * (data.length + 1);
    const drawn = (legend) =>
      Plotly.react(plot, data, { ...layout, height: layout.height + legend }, CONFIG);
    drawn(most);
    const legend = plot.querySelector(".legend .bg");
    if (legend) drawn(Math.ceil(legend.getBBox().height));
  }

  // One that fails says so in its place, and the others are drawn all the same.
  function drawSafely(plot, width) {
    try {
      draw(plot, width);
      plot.dataset.drawn = "true";
    } catch (error) {
      console.error(error);
      plot.dataset.drawn = "failed";
      plot.textContent = "This plot could not be drawn; its numbers stand below.";
    }
    plot.style.minHeight = "";
  }

  const isWaiting = (plot) => !plot.dataset.drawn;

  // One plot at a time, from the top, so that the page can be read and scrolled meanwhile.
  function drawNext() {
    const plot = plots.find(isWaiting);
    if (plot) {
      drawSafely(plot);
      timer = setTimeout(drawNext);
    } else document.documentElement.dataset.plots = plots.length;
  }

  function drawAgain() {
    clearTimeout(timer);
    delete document.documentElement.dataset.plots;
    for (const plot of plots) delete plot.dataset.drawn;
    timer = setTimeout(drawNext, 100);
  }

  for (const plot of plots) plot.style.minHeight = "16rem";
  drawNext();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAgain);
  addEventListener("resize", () => {
    if (innerWidth !== pageWidth) drawAgain(); // a telephone's address bar changes the height alone
    pageWidth = innerWidth;
  });
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("printed"); // paper is always light
    for (const plot of plots) drawSafely(plot, PRINTED_WIDTH);
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("printed");
    drawAgain();
  });
}
