// A delta by module and depth as coloured cells, with a table of its tensors: what is chosen in one is shown in both.
const NS = "http://www.w3.org/2000/svg";
const [CELL, LEFT, TOP] = [16, 150, 6];
// Of cividis, which colour-blind people read as everybody does: dark is little, light is much.
const RAMP = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];

const svgPart = (parent, name, attributes, text) => {
  const made = parent.appendChild(document.createElementNS(NS, name));
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
};
const htmlPart = (parent, name, style, text) => {
  const made = parent.appendChild(document.createElement(name));
  made.style.cssText = style;
  if (text !== undefined) made.textContent = text;
  return made;
};
const shown = (value, form) => {
  if (value === null || value === undefined) return "-";
  return form === "share" ? `${(100 * value).toPrecision(3)} %` : typeof value === "number" ? value.toPrecision(4) : value;
};

function render({ model, el }) {
  el.style.cssText = "display:block; width:100%";
  const map = htmlPart(el, "div", "overflow-x:auto");
  const scale = htmlPart(el, "div", "font-size:11px");
  const words = htmlPart(el, "div", "min-height:1.5em; font-variant-numeric:tabular-nums");
  words.setAttribute("role", "status");
  const table = htmlPart(el, "div", "max-height:14em; overflow:auto");
  let marks = new Map(); // tensor -> its cell
  let lines = new Map(); // tensor -> its row
  const rows = () => model.get("rows");
  const columns = () => model.get("columns");
  const sentence = (row) => [row.tensor, ...columns().map(([key, head, form]) => `${head} ${shown(row[key], form)}`)].join(", ");
  const chosenRow = () => rows().find((row) => row.tensor === model.get("chosen"));
  const tell = (row) => (words.textContent = row ? sentence(row) : "hover over a cell, or choose one");

  function choose(tensor, byKey) {
    model.set("chosen", tensor);
    model.save_changes();
    mark();
    if (byKey) marks.get(tensor)?.focus();
  }

  function fill(statistic, cells) {
    const known = cells.map((row) => row[statistic]).filter((value) => value > 0).map(Math.log10);
    const [low, high] = [Math.min(...known), Math.max(...known)];
    const end = (power) => (known.length ? (10 ** power).toPrecision(3) : "-");
    scale.textContent = `${statistic}: dark ${end(low)} to light ${end(high)}, log scale; struck through: untouched; grey: not measured`;
    return (row) => {
      const value = row[statistic];
      if (!(value > 0)) return "none";
      const share = high > low ? (Math.log10(value) - low) / (high - low) : 1;
      return RAMP[Math.round(share * (RAMP.length - 1))];
    };
  }

  function drawMap() {
    map.replaceChildren();
    const cells = rows().filter((row) => row.column >= 0);
    const [modules, places, statistic] = [model.get("modules"), model.get("places"), model.get("statistic")];
    const [width, height] = [LEFT + CELL * places.length + 8, TOP + CELL * modules.length + 50];
    const svg = svgPart(map, "svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": model.get("title") });
    svg.style.cssText = `width:${width}px; max-width:none; font-size:11px; fill:var(--jp-ui-font-color1, currentColor)`;
    modules.forEach((name, row) =>
      svgPart(svg, "text", { x: LEFT - 6, y: TOP + CELL * (row + 0.75), "text-anchor": "end" }, name),
    );
    const bottom = TOP + CELL * modules.length;
    let [part, parts] = ["", 0];
    places.forEach(([name, block], column) => {
      const middle = LEFT + CELL * (column + 0.5);
      if (block % 5 === 0 || name !== part) svgPart(svg, "text", { x: middle, y: bottom + 13, "text-anchor": "middle" }, String(block));
      // In two lines in turn: a part of two blocks is narrower than its name.
      if (name !== part) svgPart(svg, "text", { x: LEFT + CELL * column, y: bottom + 27 + 13 * (parts++ % 2) }, name);
      part = name;
    });
    const colour = fill(statistic, cells);
    marks = new Map();
    for (const row of cells) {
      const at = { x: LEFT + CELL * row.column + 1, y: TOP + CELL * row.row + 1, width: CELL - 2, height: CELL - 2 };
      const cell = svgPart(svg, "rect", { ...at, fill: colour(row), tabindex: -1, role: "button", "aria-label": sentence(row) });
      if (row[statistic] === null || row[statistic] === undefined) cell.setAttribute("fill", "#8883");
      else if (!(row[statistic] > 0)) {
        const ends = { x1: at.x + 3, y1: at.y + 3, x2: at.x + CELL - 5, y2: at.y + CELL - 5, stroke: "#888", "pointer-events": "none" };
        svgPart(svg, "line", ends);
        cell.setAttribute("fill", "transparent");
      }
      cell.style.cursor = "pointer";
      cell.addEventListener("pointerenter", () => tell(row));
      cell.addEventListener("focus", () => tell(row));
      cell.addEventListener("click", () => choose(row.tensor, true));
      cell.addEventListener("keydown", (event) => keyed(event, row, cells));
      marks.set(row.tensor, cell);
    }
    svg.addEventListener("pointerleave", () => tell(chosenRow()));
  }

  function keyed(event, row, cells) {
    event.stopPropagation(); // JupyterLab's own keys
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Enter" || event.key === " ") choose(row.tensor, true);
    else if (by) {
      const along = ([x, y]) => (by[0] ? x * by[0] : y * by[1]);
      const ahead = cells.filter((one) =>
        by[0] ? one.row === row.row && along([one.column - row.column, 0]) > 0 : one.column === row.column && along([0, one.row - row.row]) > 0,
      );
      ahead.sort((a, b) => along([a.column, a.row]) - along([b.column, b.row]));
      if (ahead.length) marks.get(ahead[0].tensor).focus();
    } else return;
    event.preventDefault();
  }

  function drawTable() {
    table.replaceChildren();
    const whole = htmlPart(table, "table", "border-collapse:collapse; font-variant-numeric:tabular-nums");
    const head = htmlPart(htmlPart(whole, "thead", ""), "tr", "");
    const sticky = "position:sticky; top:0; background:var(--jp-layout-color0, Canvas); padding:0.1em 0.7em; max-width:9em; text-align:";
    htmlPart(head, "th", `${sticky}left`, "tensor");
    for (const [, title] of columns()) htmlPart(head, "th", `${sticky}right`, title);
    const body = htmlPart(whole, "tbody", "");
    lines = new Map();
    for (const row of rows()) {
      const line = htmlPart(body, "tr", "cursor:pointer");
      line.tabIndex = 0;
      htmlPart(line, "td", "text-align:left; padding:0 0.7em; white-space:nowrap", row.tensor);
      for (const [key, , form] of columns()) htmlPart(line, "td", "text-align:right; padding:0 0.7em", shown(row[key], form));
      line.addEventListener("click", () => choose(row.tensor, false));
      line.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        event.stopPropagation();
        choose(row.tensor, false);
      });
      lines.set(row.tensor, line);
    }
  }

  function mark() {
    const chosen = model.get("chosen");
    for (const [tensor, cell] of marks) {
      const here = tensor === chosen;
      cell.setAttribute("aria-pressed", here);
      cell.setAttribute("stroke", here ? "#D55E00" : "none");
      cell.setAttribute("stroke-width", 3);
      cell.setAttribute("tabindex", -1);
    }
    (marks.get(chosen) ?? [...marks.values()][0])?.setAttribute("tabindex", 0);
    for (const [tensor, line] of lines) {
      line.setAttribute("aria-selected", tensor === chosen);
      line.style.background = tensor === chosen ? "#D55E0055" : "";
    }
    const line = lines.get(chosen);
    if (line) table.scrollTop = line.offsetTop - table.clientHeight / 2; // scrollIntoView would move the page
    tell(chosenRow());
  }

  const all = () => {
    drawMap();
    drawTable();
    mark();
  };
  for (const name of ["rows", "columns", "modules", "places"]) model.on(`change:${name}`, all);
  model.on("change:statistic", () => {
    drawMap();
    mark();
  });
  model.on("change:chosen", mark);
  all();
}

export default { render };
