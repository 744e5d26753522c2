// Tables that sort by a click on a header and filter by what is typed, and charts that fit paper.
"use strict";

const FEW = 100;
const counted = new Intl.NumberFormat("en");

function shown(value, kind) {
  if (value === null) return "–";
  if (kind === "count") return counted.format(value);
  if (kind === "number") return Math.abs(value) >= 1e-4 || value === 0 ? String(+value.toPrecision(5)) : value.toExponential(2);
  return value;
}

const inOrder = new Intl.Collator("en", { numeric: true }).compare;

function compare(a, b) {
  return typeof a === "number" ? a - b : inOrder(a, b);
}

for (const place of document.querySelectorAll(".sortable")) {
  const { columns, rows } = JSON.parse(place.querySelector("script").textContent);
  const [filter, count, more] = ["input", "output", "button.all"].map((each) => place.querySelector(each));
  const texts = rows.map((row) => row.map((cell, at) => shown(cell, columns[at][1])).join(" ").toLowerCase());
  const heads = [...place.querySelectorAll("th")];
  const body = place.querySelector("tbody");
  let [by, sign, every] = [null, 1, false];

  function draw() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = [...rows.keys()].filter((at) => words.every((word) => texts[at].includes(word)));
    if (by !== null) {
      // What is not known comes last, whatever the order.
      const known = found.filter((at) => rows[at][by] !== null);
      known.sort((a, b) => sign * compare(rows[a][by], rows[b][by]));
      found = known.concat(found.filter((at) => rows[at][by] === null));
    }
    const some = every ? found : found.slice(0, FEW);
    body.replaceChildren(...some.map((at) => {
      const line = document.createElement("tr");
      rows[at].forEach((cell, column) => {
        const [, kind] = columns[column];
        const place = line.insertCell();
        place.textContent = shown(cell, kind);
        place.className = kind === "text" ? (column ? "" : "name") : "number";
      });
      return line;
    }));
    count.textContent = `${counted.format(some.length)} of ${counted.format(rows.length)}`;
    more.hidden = some.length === found.length;
    heads.forEach((head, at) => {
      if (at === by) head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
  }

  heads.forEach((head, at) => head.querySelector("button").addEventListener("click", () => {
    // Numbers begin with the largest, which are looked for first.
    const first = columns[at][1] === "text" ? 1 : -1;
    [by, sign] = [at, by === at ? -sign : first];
    draw();
  }));
  filter.addEventListener("input", draw);
  more.addEventListener("click", () => { every = true; draw(); });
  draw();
}

const charts = () => document.querySelectorAll(".js-plotly-plot");
// A page of A4 between its margins.
addEventListener("beforeprint", () => charts().forEach((each) => Plotly.relayout(each, { width: 690 })));
addEventListener("afterprint", () => charts().forEach((each) => Plotly.relayout(each, { width: null, autosize: true })));
