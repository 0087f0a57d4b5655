"use strict";
// Draws the charts from the data that the page holds. Nothing is fetched; expressions are interpreted, not evaluated.
(() => {
  const data = JSON.parse(document.getElementById("peel-data").textContent);
  const records = ({ columns, texts, rows }) =>
    rows.map((row) =>
      Object.fromEntries(columns.map((name, i) => [name, name in texts && row[i] !== null ? texts[name][row[i]] : row[i]])),
    );
  const tables = {};
  const table = (name) => (tables[name] ??= records(data.tables[name]));
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const config = () => {
    const ink = dark.matches ? "#d7dae0" : "#24292f";
    const faint = dark.matches ? "#3a4049" : "#dfe3e8";
    const text = { labelColor: ink, titleColor: ink, labelFontSize: 12, titleFontSize: 12 };
    return {
      font: "system-ui, sans-serif",
      axis: { ...text, gridColor: faint, domainColor: ink, tickColor: ink },
      text: { color: ink, font: "system-ui, sans-serif", fontSize: 12 },
      legend: { ...text, symbolStrokeColor: ink },
      view: { stroke: faint },
    };
  };
  const draw = async () => {
    for (const figure of document.querySelectorAll("figure[data-chart]")) {
      const chart = data.charts[figure.dataset.chart];
      const spec = { ...chart.spec, config: config(), datasets: {} };
      for (const name of chart.tables) spec.datasets[name] = table(name);
      const place = figure.querySelector(".chart");
      try {
        const { view } = await vegaEmbed(place, spec, {
          ast: true,
          actions: false,
          defaultStyle: false,
          renderer: "canvas",
          tooltip: { disableDefaultStyle: true, theme: "peel" },
        });
        (window.peelViews ??= {})[figure.dataset.chart] = view;
      } catch (error) {
        place.textContent = `This chart cannot be drawn: ${error.message}. Its table is below.`;
      }
    }
    document.documentElement.dataset.drawn = "yes";
  };
  dark.addEventListener("change", draw);
  draw();
})();
