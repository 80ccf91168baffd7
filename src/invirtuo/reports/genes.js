// The section "Genes" of a page: one condition at a time, its genes in a table and in three charts (Chart.js).
"use strict";
(async () => {
  const section = document.getElementById("genes");
  const find = (selector) => section.querySelector(selector);
  const ROWS = 15, LEVEL = 0.05, LARGEST_Q = 50;
  const ORIGINS = { control: "control", real: "seen", predicted: "predicted" };
  const STATUSES = {  // colour and shape, so that neither has to be told apart alone
    neither: ["#9aa3ab", "circle", 2], both: ["#0072b2", "circle", 3.5], "false call": ["#d55e00", "triangle", 4.5],
    missed: ["#8a5a00", "rect", 4], opposite: ["#a3195b", "crossRot", 5],
  };

  // the data, unpacked
  const packed = Uint8Array.from(atob(document.getElementById("gene-data").textContent.trim()), (c) => c.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = await new Response(unpacked).json();
  const chosen = { condition: 0, text: "", status: "", column: "effect", falling: true, rows: ROWS, gene: null };

  // the genes of the condition chosen, a record each
  const status = (effect, real, q, qReal) => {
    if (q === null || qReal === null) return "";
    if (q < LEVEL && qReal < LEVEL) return effect * real < 0 ? "opposite" : "both";
    return q < LEVEL ? "false call" : qReal < LEVEL ? "missed" : "neither";
  };
  let genes = [];
  const readCondition = () => {
    const own = data.conditions[chosen.condition];
    genes = data.genes.map((gene, i) => ({
      gene, i, effect: own.effect[i], low: own.low[i], high: own.high[i], real: own.real[i], q: own.q[i],
      q_real: own.q_real[i], status: status(own.effect[i], own.real[i], own.q[i], own.q_real[i]),
    }));
  };
  const matching = () => genes.filter((g) =>
    g.gene.toLowerCase().includes(chosen.text) && (!chosen.status || g.status === chosen.status));
  const bySize = (a, b) => Math.abs(b.effect) - Math.abs(a.effect);

  // charts
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  Chart.defaults.color = colour("--soft");
  Chart.defaults.borderColor = colour("--line");
  Chart.defaults.animation = false;
  Chart.defaults.maintainAspectRatio = false;
  const axes = (x, y) => ({ x: { title: { display: true, text: x } }, y: { title: { display: true, text: y } } });
  const label = (point) => point.raw.gene + ": " + point.raw.x + ", " + point.raw.y;
  const scatter = (role, x, y) => new Chart(find(`[data-role=${role}]`), {
    type: "scatter",
    data: { datasets: [] },
    options: {
      scales: axes(x, y),
      plugins: { legend: { labels: { usePointStyle: true, boxHeight: 6 } }, tooltip: { callbacks: { label } } },
      onClick: (event, hits, chart) => {
        const point = hits.length ? chart.data.datasets[hits[0].datasetIndex].data[hits[0].index] : {};
        if (point.i !== undefined) choose(point.i);
      },
    },
  });
  const seen = scatter("seen", "seen", "predicted");
  const volcano = scatter("volcano", "predicted effect", "-log10 q");
  const shares = new Chart(find("[data-role=shares]"), {
    type: "line",
    data: { labels: [], datasets: [] },
    options: { scales: axes("log expression", "% of cells"), elements: { point: { radius: 1.5 } } },
  });
  const points = (x, y, found) => {
    const isFound = chosen.text ? new Set(found.map((g) => g.i)) : null;
    return Object.entries(STATUSES).map(([name, [fill, pointStyle, radius]]) => {
      const own = genes.filter((g) => (g.status || "neither") === name && x(g) !== null && y(g) !== null);
      return {
        label: name, pointStyle, borderColor: fill, backgroundColor: fill + "b0",
        data: own.map((g) => ({ x: x(g), y: y(g), gene: g.gene, i: g.i })),
        pointRadius: own.map((g) => (!isFound ? radius : isFound.has(g.i) ? radius + 3 : 1)),
      };
    }).filter((set) => set.data.length);
  };
  const draw = (found) => {
    const all = genes.flatMap((g) => (g.real === null ? [] : [g.real, g.effect]));
    const ends = all.length ? [Math.min(...all), Math.max(...all)].map((at) => ({ x: at, y: at, gene: "equal" })) : [];
    const equal = { type: "line", label: "equal", data: ends, pointRadius: 0, borderWidth: 1, borderDash: [4, 3], borderColor: colour("--soft") };
    seen.data.datasets = [...points((g) => g.real, (g) => g.effect, found), equal];
    volcano.data.datasets = points(
      (g) => g.effect, (g) => (g.q === null ? null : Math.min(-Math.log10(Math.max(g.q, 1e-300)), LARGEST_Q)), found);
    seen.update();
    volcano.update();
  };
  const drawGene = () => {
    const own = data.conditions[chosen.condition].shares;
    find("[data-role=gene]").textContent = own && chosen.gene !== null ? "Distribution of " + data.genes[chosen.gene] : "Distribution";
    if (!own || chosen.gene === null) return;
    const top = data.top[chosen.gene], steps = own.predicted[chosen.gene].length - 1;
    shares.data.labels = Array.from({ length: steps + 1 }, (_, i) => (i ? (top * (i - 0.5) / steps).toFixed(1) : "0"));
    const colours = { control: "#9aa3ab", real: "#0072b2", predicted: "#d55e00" };
    shares.data.datasets = Object.keys(ORIGINS).filter((origin) => own[origin]).map((origin) => ({
      label: ORIGINS[origin], data: own[origin][chosen.gene], borderColor: colours[origin],
      backgroundColor: colours[origin], stepped: "middle", borderDash: origin === "control" ? [4, 3] : [],
    }));
    shares.update();
  };

  // the table
  const written = (x) => (x === null || x === "" ? "–" : typeof x === "string" ? x : Math.abs(x) < 0.001 && x ? x.toExponential(1) : x.toFixed(3));
  const ordered = (found) => {
    const key = chosen.column, sign = chosen.falling ? -1 : 1;
    const value = (g) => (key === "effect" || key === "real" ? Math.abs(g[key]) : g[key]);
    const isMissing = (g) => g[key] === null || g[key] === "";
    return [...found].sort((a, b) => isMissing(a) - isMissing(b) ||
      sign * (typeof value(a) === "string" ? value(a).localeCompare(value(b)) : value(a) - value(b)));
  };
  const write = (found) => {
    const body = find("tbody");
    body.replaceChildren(...ordered(found).slice(0, chosen.rows).map((g) => {
      const row = document.createElement("tr");
      const head = row.appendChild(document.createElement("th"));
      head.scope = "row";
      const button = head.appendChild(document.createElement("button"));
      button.type = "button";
      button.textContent = g.gene;
      button.addEventListener("click", () => choose(g.i));
      for (const column of ["effect", "low", "high", "real", "q", "q_real", "status"])
        row.appendChild(document.createElement("td")).textContent = written(g[column]);
      row.classList.toggle("chosen", g.i === chosen.gene);
      return row;
    }));
    for (const head of section.querySelectorAll("th[data-column]"))
      head.setAttribute("aria-sort", head.dataset.column !== chosen.column ? "none" : chosen.falling ? "descending" : "ascending");
    find("[data-role=more]").hidden = found.length <= chosen.rows;
    const counts = Object.keys(STATUSES).map((name) => [name, genes.filter((g) => g.status === name).length]).filter(([, n]) => n);
    find("[data-role=summary]").textContent =
      `${found.length} of ${genes.length} genes` + (counts.length ? "; changed: " + counts.map(([name, n]) => `${name} ${n}`).join(", ") : "");
  };

  // what one does to it
  const show = () => {
    const found = matching();
    if (chosen.text && found.length && !found.some((g) => g.i === chosen.gene))
      chosen.gene = (found.find((g) => g.gene.toLowerCase() === chosen.text) || [...found].sort(bySize)[0]).i;
    draw(found);
    write(found);
    drawGene();
  };
  const choose = (i) => { chosen.gene = i; write(matching()); drawGene(); };
  const conditions = find("select[name=condition]");
  data.conditions.forEach((own, i) => conditions.add(new Option(own.name, i)));
  conditions.addEventListener("change", () => { chosen.condition = +conditions.value; readCondition(); show(); });
  find("input").addEventListener("input", (event) => { chosen.text = event.target.value.trim().toLowerCase(); chosen.rows = ROWS; show(); });
  find("select[name=status]").addEventListener("change", (event) => { chosen.status = event.target.value; chosen.rows = ROWS; show(); });
  find("[data-role=more]").addEventListener("click", () => { chosen.rows += 100; write(matching()); });
  for (const head of section.querySelectorAll("th[data-column]"))
    head.querySelector("button").addEventListener("click", () => {
      chosen.falling = head.dataset.column === chosen.column ? !chosen.falling : !["gene", "q", "q_real", "status"].includes(head.dataset.column);
      chosen.column = head.dataset.column;
      write(matching());
    });
  readCondition();
  chosen.gene = genes.length ? [...genes].sort(bySize)[0].i : null;
  show();
})();
