"use strict";
// Draws every figure in the colours that the style sheet gives at this moment, and again when the
// reader's system turns from light to dark or back.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const styles = getComputedStyle(document.documentElement);
  const coloured = (value) => {
    if (typeof value === "string") {
      return value.startsWith("var(--") ? styles.getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) return value.map(coloured);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item)]));
  };
  // On a touch screen a finger on a figure scrolls the page.
  const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
  const config = { displayModeBar: false, responsive: true, doubleClick: "reset" };
  const draw = () => {
    for (const node of document.querySelectorAll(".plot")) {
      const figure = figures[node.dataset.figure];
      Plotly.react(node, coloured(figure.data), { ...coloured(figure.layout), dragmode }, config);
    }
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
