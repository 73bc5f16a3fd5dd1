"use strict";
// Texts of records come in as JSON and go out as text nodes: nothing here makes markup of them.
(() => {
  const { table, flips, charts, config } = JSON.parse(document.getElementById("data").textContent);
  const state = { model: table.rows[table.reference].model, reference: table.reference, sort: null, down: true };

  function element(name, { text, ...attributes } = {}, ...children) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value !== false && value !== null) made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children);
    return made;
  }

  function options(select, values, chosen) {
    select.replaceChildren(...values.map(([value, text]) => element("option", { value, text, selected: value === chosen })));
  }

  // A figure with as many digits as its error tells.
  function digits(column, error) {
    if (column.unit === "%") return 1;
    return Math.min(8, Math.max(0, 1 - Math.floor(Math.log10(Math.abs(error) || 1e-3))));
  }

  const signed = (number, places) => (number >= 0 ? "+" : "\u2212") + Math.abs(number).toFixed(places);

  function difference(row, place) {
    const other = state.reference;
    if (row === other) return null;
    const [first, second] = row < other ? [row, other] : [other, row];
    const cells = table.differences[`${first}-${second}`];
    const cell = cells ? cells[place] : null;
    if (!cell) return null;
    const [mean, low, high] = row < other ? cell : [-cell[0], -cell[2], -cell[1]];
    return { mean, low, high };
  }

  function differenceShown(row, place) {
    const found = difference(row, place);
    if (!found) return null;
    const column = table.columns[place];
    const places = digits(column, (found.high - found.low) / 4);
    const sure = found.low > 0 || found.high < 0;
    const better = column.better === null ? null : found.mean > 0 === column.better;
    const mark = !sure || better === null ? "" : better ? " better" : " worse";
    const text = `${signed(found.mean, places)} [${signed(found.low, places)}, ${signed(found.high, places)}]${sure ? " *" : ""}`;
    return element("span", { class: `difference${mark}`, text });
  }

  function figure(row, place) {
    const cell = table.rows[row].cells[place];
    const made = element("td", { class: "number" });
    if (!cell) return made;
    const places = digits(table.columns[place], cell.stderr ?? cell.mean / 100);
    made.append(element("span", { text: cell.mean.toFixed(places) }));
    if (cell.stderr !== null) made.append(element("span", { class: "error", text: ` (${cell.stderr.toFixed(places)})` }));
    const ends = cell.low === null ? "" : `95 %: ${cell.low.toPrecision(4)} to ${cell.high.toPrecision(4)}`;
    made.title = [ends, cell.n === null ? "" : `n = ${cell.n}`].filter(Boolean).join("; ");
    const shown = differenceShown(row, place);
    if (shown) made.append(shown);
    return made;
  }

  function ordered() {
    const own = table.rows.map((_, index) => index).filter((index) => table.rows[index].model === state.model);
    const { sort, down } = state;
    if (sort !== null) {
      const key = (index) => (typeof sort === "string" ? table.rows[index][sort] : table.rows[index].cells[sort]?.mean);
      own.sort((a, b) => {
        const [left, right] = [key(a), key(b)];
        if (left == null || right == null) return (left == null) - (right == null);
        const order = typeof left === "string" ? left.localeCompare(right, "en", { numeric: true }) : left - right;
        return down ? -order : order;
      });
    }
    return [...own.filter((index) => table.rows[index].full), ...own.filter((index) => !table.rows[index].full)];
  }

  function heading(text, key, number) {
    const sorted = state.sort === key ? (state.down ? "descending" : "ascending") : "none";
    const arrow = sorted === "none" ? "" : state.down ? " \u2193" : " \u2191";
    const click = () => {
      Object.assign(state, state.sort === key ? { down: !state.down } : { sort: key, down: number });
      draw();
    };
    const button = element("button", { type: "button", text: text + arrow, onclick: click });
    return element("th", { scope: "col", class: number ? "number" : "", "aria-sort": sorted }, button);
  }

  function line(index) {
    const row = table.rows[index];
    const choose = () => {
      state.reference = index;
      draw();
    };
    const chosen = index === state.reference;
    const radio = element("input", { type: "radio", name: "reference", "aria-label": `compare with ${row.label}`, onchange: choose });
    radio.checked = chosen;
    const names = [row.full ? "full precision" : row.bits, row.full && row.label === "full precision" ? "" : row.label];
    const limit = row.limit === null ? "" : ` (first ${row.limit})`;
    return element(
      "tr",
      { class: [row.full ? "full" : "", chosen ? "reference" : ""].join(" ").trim(), "data-row": index },
      element("td", {}, radio),
      element("th", { scope: "row", text: names[0] }),
      element("th", { scope: "row", text: names[1] }),
      element("td", { class: "number", text: row.seeds }),
      element("td", { class: "number", text: sizes(row) + limit }),
      ...table.columns.map((_, place) => figure(index, place)),
    );
  }

  function sizes(row) {
    const known = row.cells.filter((cell) => cell && cell.n !== null).map((cell) => cell.n);
    if (!known.length) return "";
    const [least, most] = [Math.min(...known), Math.max(...known)];
    return least === most ? `${least}` : `${least}-${most}`;
  }

  function draw() {
    const own = table.columns.map((column, place) => heading(`${column.name}, ${column.unit}`, place, true));
    const head = element(
      "tr",
      {},
      element("th", { scope: "col", text: "reference" }),
      heading("bits", "bits", false),
      heading("method", "label", false),
      element("th", { scope: "col", class: "number", text: "seeds", title: "models x rotations" }),
      element("th", { scope: "col", class: "number", text: "n" }),
      ...own,
    );
    const focused = document.activeElement?.closest?.("#table [data-row]")?.dataset.row;
    document.getElementById("table").replaceChildren(element("thead", {}, head), element("tbody", {}, ...ordered().map(line)));
    if (focused !== undefined) document.querySelector(`#table [data-row="${focused}"] input`)?.focus();
  }

  function drawModels() {
    const names = [...new Set(table.rows.map((row) => row.model))];
    const select = document.getElementById("model");
    options(select, names.map((name) => [name, name]), state.model);
    document.getElementById("models").hidden = names.length < 2;
    select.addEventListener("change", () => {
      const first = table.rows.findIndex((row) => row.model === select.value);
      Object.assign(state, { model: select.value, reference: first });
      draw();
    });
  }

  function drawFlips() {
    const [rows, tasks, kind] = ["flip-row", "flip-task", "flip-kind"].map((name) => document.getElementById(name));
    const named = (index) => table.rows[index].name;
    options(rows, [...new Set(flips.map((part) => part.row))].map((index) => [`${index}`, named(index)]));
    const show = () => {
      const part = flips.find((one) => `${one.row}` === rows.value && one.task === tasks.value);
      const items = part.items.filter((item) => !kind.value || item.kind === kind.value);
      const cut = part.lost + part.won + part.other > part.items.length ? `; the first ${part.items.length} are here` : "";
      document.getElementById("flip-count").textContent =
        `${part.task}, ${part.n} items: ${part.lost} lost, ${part.won} won, ${part.other} answered otherwise at the same score${cut}. ` +
        `${part.record} beside ${part.reference}.`;
      const asked = items.some((item) => item.question);
      const words = ["item", ...(asked ? ["end of the prompt"] : []), "target", "full precision", "quantized", "score"];
      const cells = (item) => [
        item.item,
        ...(asked ? [item.question] : []),
        item.target,
        item.full,
        item.quantized,
        item.scores.join(" \u2192 "),
      ];
      document.getElementById("flip-table").replaceChildren(
        element("thead", {}, element("tr", {}, ...words.map((text) => element("th", { scope: "col", text })))),
        element(
          "tbody",
          {},
          ...items.map((item) => element("tr", { class: item.kind }, ...cells(item).map((text) => element("td", { text: `${text}` })))),
        ),
      );
    };
    const choose = () => {
      const own = flips.filter((part) => `${part.row}` === rows.value);
      options(tasks, own.map((part) => [part.task, `${part.task} (${part.lost + part.won} flipped)`]), tasks.value);
      show();
    };
    rows.addEventListener("change", choose);
    tasks.addEventListener("change", show);
    kind.addEventListener("change", show);
    choose();
  }

  drawModels();
  draw();
  if (flips.length) drawFlips();
  const drawn = Object.entries(charts).map(([name, spec]) =>
    window.vegaEmbed(`#chart-${name}`, spec, { renderer: "svg", actions: false, config }),
  );
  Promise.all(drawn).then(() => document.body.setAttribute("data-drawn", ""));
})();
