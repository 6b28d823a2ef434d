// Dots over a curve that can be clicked, or reached with Tab and chosen with Enter or Space.
const NS = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT] = [420, 124, 60, 34, 10, 24];

const part = (parent, name, attributes, text) => {
  const made = parent.appendChild(document.createElementNS(NS, name));
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
};

// Multipliers span decades and may be 0 or negative.
const squeezed = (x) => Math.sign(x) * Math.log10(1 + Math.abs(x));
const short = (x) => Number(x.toPrecision(4)).toString();

function drawn(model, el) {
  const dots = model.get("dots");
  el.replaceChildren();
  const svg = part(el, "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": model.get("title") });
  svg.style.cssText = "width:100%; max-width:400px; font-size:11px; fill:var(--jp-ui-font-color1, currentColor)";
  const xs = dots.map((dot) => squeezed(dot.x));
  const ys = dots.map((dot) => dot.y);
  const scale = (values, from, to) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    return (value) => (high > low ? from + ((value - low) / (high - low)) * (to - from) : (from + to) / 2);
  };
  const across = scale(xs, LEFT, WIDTH - RIGHT);
  const up = scale(ys, HEIGHT - BOTTOM, TOP);
  const line = { stroke: "var(--jp-border-color1, #888)" };
  part(svg, "line", { x1: LEFT - 8, x2: WIDTH - RIGHT + 8, y1: HEIGHT - BOTTOM + 8, y2: HEIGHT - BOTTOM + 8, ...line });
  part(svg, "text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 2, "text-anchor": "middle" }, model.get("x_label"));
  part(
    svg,
    "text",
    { x: 10, y: HEIGHT / 2, "text-anchor": "middle", transform: `rotate(-90 10 ${HEIGHT / 2})` },
    model.get("y_label"),
  );
  if (!dots.length) return;
  for (const value of new Set([Math.min(...ys), Math.max(...ys)]))
    part(svg, "text", { x: LEFT - 12, y: up(value) + 4, "text-anchor": "end" }, value.toPrecision(3));
  let last = -Infinity;
  for (const x of [...new Set(dots.map((dot) => dot.x))].sort((a, b) => a - b))
    if (across(squeezed(x)) - last > 34) {
      last = across(squeezed(x));
      part(svg, "text", { x: last, y: HEIGHT - BOTTOM + 20, "text-anchor": "middle" }, short(x));
    }
  const path = [...dots].sort((a, b) => a.x - b.x).map((dot) => `${across(squeezed(dot.x))},${up(dot.y)}`);
  part(svg, "polyline", { points: path.join(" "), fill: "none", ...line });
  dots.forEach((dot, number) => {
    const chosen = number === model.get("chosen");
    const mark = part(svg, "circle", {
      cx: across(squeezed(dot.x)),
      cy: up(dot.y),
      r: chosen ? 8 : 6,
      tabindex: 0,
      role: "button",
      "aria-label": dot.label,
      "aria-pressed": chosen,
      fill: chosen ? "#D55E00" : "#0072B2",
      stroke: "var(--jp-layout-color0, white)",
    });
    mark.style.cursor = "pointer";
    part(mark, "title", {}, dot.label);
    const choose = () => {
      model.set("chosen", number);
      model.save_changes();
    };
    mark.addEventListener("click", choose);
    mark.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      event.stopPropagation();
      choose();
    });
  });
}

function render({ model, el }) {
  const again = () => {
    const at = [...el.querySelectorAll("circle")].indexOf(document.activeElement);
    drawn(model, el);
    if (at >= 0) el.querySelectorAll("circle")[at]?.focus();
  };
  for (const name of ["dots", "chosen", "x_label", "y_label"]) model.on(`change:${name}`, again);
  again();
}

export default { render };
