"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const FONT = { family: "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif", size: 11, color: "#1b1f24" };
  const AXIS = { gridcolor: "#e6eaee", zerolinecolor: "#c4ccd4", linecolor: "#8c959f", ticks: "outside", ticklen: 3, tickcolor: "#8c959f", automargin: true };
  const BASE = { font: FONT, margin: { l: 52, r: 12, t: 8, b: 40 }, showlegend: false, hovermode: "x unified", autosize: true,
    paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff", hoverlabel: { font: { size: 11 }, bgcolor: "#ffffffee", namelength: -1 } };
  // an explicit list, because plotly's default has a button that sends the figure to a server
  const BUTTONS = ["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"];
  const CONFIG = { displaylogo: false, responsive: true, plotlyServerURL: "" };
  const boxes = all("[data-dimension]");
  const status = document.getElementById("status");
  const data = new Map(); // figure -> its parsed panels
  const stale = new Set(); // plots not yet drawn for the current controls
  const near = new Set(); // plots on or near the screen

  // selection

  const off = (dimension, value) => boxes.some(box => box.dataset.dimension === dimension && box.value === String(value) && !box.checked);
  const kept = where => Object.entries(where).every(([dimension, value]) => !off(dimension, value));
  const chosen = chooser => chooser.type === "range" ? chooser.dataset.values.split(" ")[chooser.value] : chooser.value;

  const agrees = (where, wanted) => Object.entries(wanted).every(([name, value]) => !(name in where) || String(where[name]) === value);

  function choices(figure) {
    return Object.fromEntries(all("[data-choose]", figure).map(chooser => [chooser.dataset.choose, chosen(chooser)]));
  }

  function panelOf(plot) {
    const name = plot.dataset.figure;
    if (!data.has(name)) data.set(name, JSON.parse(document.getElementById(`graph-${name}`).textContent).panels);
    return data.get(name)[plot.dataset.panel];
  }

  /* The traces selected by the figure's choosers; those hidden by the controls are kept as invisible. */
  function tracesOf(plot) {
    const wanted = choices(plot.closest("figure"));
    const traces = panelOf(plot).traces.filter(({ where }) => agrees(where, wanted));
    return traces.map(entry => ({ ...entry, visible: kept(entry.where) }));
  }

  /* The panel's layout, with the range of the y axis for the figure's choices. */
  function layoutOf(plot) {
    const panel = panelOf(plot);
    const layout = { ...BASE, ...panel.layout };
    if (!panel.layout.xaxis) return { ...layout, margin: { l: 8, r: 8, t: 8, b: 30 } };
    const chosen = panel.ranges.find(({ where }) => agrees(where, choices(plot.closest("figure"))));
    const range = chosen ? { range: chosen.range } : {};
    const title = { standoff: 8, ...panel.layout.yaxis.title };
    return { ...layout, xaxis: { ...AXIS, ...panel.layout.xaxis }, yaxis: { ...AXIS, ...panel.layout.yaxis, ...range, title } };
  }

  function draw(plot) {
    stale.delete(plot);
    const traces = tracesOf(plot).map(({ trace, visible }) => ({ ...trace, visible }));
    if (!document.body.classList.contains("printing")) return Plotly.react(plot, traces, layoutOf(plot), { ...CONFIG, modeBarButtons: [panelOf(plot).layout.xaxis ? BUTTONS : ["toImage"]] });
    Plotly.purge(plot); // a static plot appears at once; others fade in, and printing does not wait
    return Plotly.newPlot(plot, traces, { ...layoutOf(plot), width: plot.clientWidth, height: plot.clientHeight }, { staticPlot: true });
  }

  /* Hide panels and keys by the controls, update text alternatives, and redraw plots near the screen. */
  function update(figures = all("figure.graph")) {
    for (const figure of figures) {
      const plots = all(".plotly-graph", figure);
      for (const plot of plots) {
        const shown = tracesOf(plot).filter(entry => entry.visible);
        const panel = panelOf(plot);
        plot.closest(".panel").hidden = !shown.length || !kept(panel.where);
        plot.setAttribute("aria-label", `${panel.label}: ${shown.map(entry => entry.say).join("; ")}.`);
        stale.add(plot);
      }
      for (const key of all(".keys li", figure)) key.hidden = !kept({ ...key.dataset });
      const none = figure.querySelector(".none");
      if (none) none.hidden = plots.some(plot => !plot.closest(".panel").hidden);
    }
    for (const group of all("details.images, .card")) group.hidden = !kept({ ...group.dataset });
    for (const plot of near) if (stale.has(plot)) draw(plot);
  }

  /* Disable options of choosers that the controls hide; a hidden choice is replaced by the first visible one. */
  function restrict() {
    for (const select of all("select[data-choose]")) {
      for (const option of select.options) option.disabled = off(select.dataset.choose, option.value);
      const first = [...select.options].find(option => !option.disabled);
      if (first && select.selectedOptions[0].disabled) select.value = first.value;
    }
  }

  let spoken = 0;
  function announce(words) {
    status.textContent = words;
    clearTimeout(spoken);
    spoken = setTimeout(() => { status.textContent = ""; }, 8000);
  }

  for (const box of boxes) {
    box.addEventListener("change", () => {
      restrict();
      update();
      announce(`${box.parentElement.textContent.trim()} ${box.checked ? "shown" : "hidden"}`);
    });
  }
  for (const chooser of all("[data-choose]")) {
    chooser.addEventListener("input", () => {
      const figure = chooser.closest("figure");
      if (chooser.type === "range") {
        figure.querySelector("output").textContent = chosen(chooser);
        chooser.setAttribute("aria-valuetext", `${chooser.dataset.choose} ${chosen(chooser)}`);
      }
      update([figure]);
    });
  }

  // lazy drawing

  const watcher = new IntersectionObserver(entries => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) near.add(target); else near.delete(target);
      if (isIntersecting && stale.has(target)) draw(target);
    }
  }, { rootMargin: "500px" });
  update();
  for (const plot of all(".plotly-graph")) watcher.observe(plot);
  window.renderAll = () => Promise.all([...stale].filter(plot => !plot.closest(".panel").hidden).map(draw));

  // printing: all plots are drawn, at the width of the paper

  const restale = () => { for (const plot of all(".plotly-graph")) stale.add(plot); };
  let opened = [];
  window.addEventListener("beforeprint", () => {
    document.body.classList.add("printing");
    opened = all("details[data-print]:not([open])");
    for (const details of opened) details.open = true;
    restale();
    window.renderAll();
  });
  window.addEventListener("afterprint", () => {
    document.body.classList.remove("printing");
    for (const details of opened) details.open = false;
    for (const plot of all(".js-plotly-plot")) Plotly.purge(plot);
    restale();
    for (const plot of near) draw(plot);
  });

  // keyboard control of plots

  const at = new WeakMap(); // plot -> position of the epoch under the keyboard cursor
  function step(plot, by) {
    const curves = plot.data.map((trace, curveNumber) => ({ trace, curveNumber })).filter(({ trace }) => trace.visible !== false && trace.hoverinfo !== "skip" && Array.isArray(trace.x) && trace.type !== "heatmap");
    const xs = [...new Set(curves.flatMap(({ trace }) => trace.x))].sort((a, b) => a - b);
    if (!xs.length) return;
    const place = Math.min(Math.max((at.get(plot) ?? (by > 0 ? -1 : xs.length)) + by, 0), xs.length - 1);
    at.set(plot, place);
    const points = curves.map(({ trace, curveNumber }) => ({ curveNumber, pointNumber: trace.x.indexOf(xs[place]), trace })).filter(point => point.pointNumber >= 0);
    Plotly.Fx.hover(plot, { xval: xs[place], yval: points[0].trace.y[points[0].pointNumber] });
    if (status) announce(`${plot.layout.xaxis.title.text} ${xs[place]}: ${points.map(({ trace, pointNumber }) => `${trace.name} ${trace.y[pointNumber]}`).join("; ")}`);
  }
  function leave(plot) {
    at.delete(plot);
    Plotly.Fx.unhover(plot);
  }
  document.addEventListener("focusout", event => { if (at.has(event.target)) leave(event.target); });
  document.addEventListener("keydown", event => {
    const plot = event.target;
    if (!plot.classList?.contains("js-plotly-plot") || !plot.data) return;
    if (event.key === "Escape") leave(plot);
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    step(plot, event.key === "ArrowRight" ? 1 : -1);
  });

  // tables: the page holds all rows, compressed

  async function csv(name) {
    const bytes = Uint8Array.from(atob(document.getElementById(`table-${name}`).textContent), character => character.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  function parse(text) {
    const cell = /("(?:[^"]|"")*"|[^,\n]*)(,|\n)/gy; // each row ends with a line feed
    const rows = [[]];
    for (const [, value, end] of text.matchAll(cell)) {
      const text = value.startsWith('"') ? value.slice(1, -1).replaceAll('""', '"') : value;
      rows.at(-1).push(text.replace(/^'('*[=+\-@\t\r])/, "$1")); // the leading quote protects spreadsheets from formulas
      if (end === "\n") rows.push([]);
    }
    return rows.slice(1, -1);
  }

  const numeric = value => value !== "" && (!Number.isNaN(Number(value)) || /^-?inf$/.test(value));
  const asNumber = value => /inf$/.test(value) ? (value[0] === "-" ? -Infinity : Infinity) : Number(value);
  const shown = (value, right) => right && /[.e]/.test(value) ? String(Number(Number(value).toPrecision(5))) : value;

  /* Blank cells last; numbers by size where both are numbers, otherwise by name. */
  function compare(one, other, sign) {
    if (one === "" || other === "") return (one === "") - (other === "");
    return sign * (numeric(one) && numeric(other) ? asNumber(one) - asNumber(other) || 0 : one.localeCompare(other, "en"));
  }

  function fill(table, rows) {
    const heads = all("thead th", table);
    const body = document.createElement("tbody");
    for (const row of rows) {
      const line = body.insertRow();
      row.forEach((value, place) => {
        const cell = line.insertCell();
        cell.className = heads[place].className;
        cell.textContent = shown(value, cell.classList.contains("number"));
        if (heads[place].textContent === "verdict") cell.dataset.verdict = value;
      });
    }
    table.tBodies[0].replaceWith(body);
  }

  async function refresh(table) {
    const rows = parse(await csv(table.dataset.table));
    const heads = all("thead th", table);
    const column = heads.findIndex(head => head.getAttribute("aria-sort") !== "none");
    const sign = column >= 0 && heads[column].getAttribute("aria-sort") === "descending" ? -1 : 1;
    if (column >= 0) rows.sort((a, b) => compare(a[column], b[column], sign));
    fill(table, rows.slice(0, table.dataset.whole ? rows.length : Number(table.dataset.first)));
  }

  document.addEventListener("click", async event => {
    const button = event.target.closest("button");
    if (!button) return;
    const table = button.closest("table[data-table]");
    if (button.dataset.save) {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([await csv(button.dataset.save)], { type: "text/csv" }));
      link.download = `${button.dataset.save}.csv`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    } else if (button.dataset.all) {
      const whole = document.querySelector(`table[data-table="${button.dataset.all}"]`);
      whole.dataset.whole = "yes";
      await refresh(whole);
      button.closest("p").querySelector(".count").textContent = "All rows.";
      button.remove();
    } else if (table) {
      const head = button.closest("th");
      const next = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      for (const other of all("thead th", table)) other.setAttribute("aria-sort", other === head ? next : "none");
      await refresh(table);
    }
  });
})();
