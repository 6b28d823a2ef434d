// A factor for each block: drag a handle, paint over several, or use the arrow keys.
const NS = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [560, 140, 44, 44, 12, 32];
const [SMALL, LARGE] = [0.05, 0.25]; // of the arrow keys, and of Page Up and Down

const part = (parent, name, attributes, text) => {
  const made = parent.appendChild(document.createElementNS(NS, name));
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
};
const tidy = (value) => Math.round(value * 1e4) / 1e4;

function render({ model, el }) {
  let values = [...model.get("values")]; // as drawn: the model's own once a drag ends
  let pressed = null; // {block, y, alone}
  let focused = 0; // the one handle that Tab reaches

  const limits = () => {
    const [low, high] = [Math.min(0, ...values), Math.max(2, ...values)];
    return { low, high };
  };
  const across = (block) => LEFT + ((block + 0.5) / values.length) * (WIDTH - LEFT - RIGHT);
  const up = (value, { low, high }) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - BOTTOM - TOP);
  const send = () => {
    model.set("values", values);
    model.save_changes();
  };
  const choose = (block) => {
    focused = block;
    if (model.get("chosen") === block) return;
    model.set("chosen", block);
    model.save_changes();
  };

  const svg = part(el, "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group" });
  svg.style.cssText =
    "width:100%; max-width:560px; font-size:11px; touch-action:none; user-select:none; " +
    "fill:var(--jp-ui-font-color1, currentColor)";

  function bars(behind, step) {
    const known = behind.filter((one) => one !== null);
    const most = Math.max(...known.map(Math.abs), 1e-12);
    const floor = HEIGHT - BOTTOM;
    behind.forEach((one, block) => {
      if (one === null) return;
      const height = (Math.abs(one) / most) * (floor - TOP) * 0.9;
      const bar = { x: across(block) - step * 0.4, y: floor - height, width: step * 0.8, height };
      part(svg, "rect", { ...bar, fill: one < 0 ? "#D55E00" : "#E69F00", opacity: 0.35 });
    });
    const label = `${model.get("behind_label")} (bars; highest ${(100 * most).toPrecision(3)} %)`;
    part(svg, "text", { x: WIDTH - RIGHT + 40, y: TOP - 2, "text-anchor": "end" }, label);
  }

  function draw() {
    const [names, span, step] = [model.get("names"), limits(), (WIDTH - LEFT - RIGHT) / values.length];
    svg.setAttribute("aria-label", model.get("title"));
    svg.replaceChildren();
    const behind = model.get("behind");
    if (behind.length) bars(behind, step);
    const line = { stroke: "var(--jp-border-color1, #888)" };
    for (const value of new Set([span.low, 0, 1, span.high])) {
      const dash = value === 1 ? { "stroke-dasharray": "4 3" } : {};
      part(svg, "line", { x1: LEFT, x2: WIDTH - RIGHT, y1: up(value, span), y2: up(value, span), ...line, ...dash });
      part(svg, "text", { x: LEFT - 6, y: up(value, span) + 4, "text-anchor": "end" }, String(tidy(value)));
    }
    part(svg, "text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 2, "text-anchor": "middle" }, model.get("x_label"));
    const points = values.map((value, block) => `${across(block)},${up(value, span)}`);
    part(svg, "polyline", { points: points.join(" "), fill: "none", stroke: "#0072B2", "stroke-width": 1.5 });
    const every = Math.ceil(26 / step);
    values.forEach((value, block) => {
      if (block % every === 0)
        part(svg, "text", { x: across(block), y: HEIGHT - BOTTOM + 14, "text-anchor": "middle" }, String(block));
      const chosen = block === model.get("chosen");
      const mark = part(svg, "circle", {
        cx: across(block),
        cy: up(value, span),
        r: chosen ? 8 : 6,
        fill: chosen ? "#D55E00" : "#0072B2",
        stroke: "var(--jp-layout-color0, white)",
        tabindex: block === focused ? 0 : -1,
        role: "slider",
        "aria-label": names[block],
        "aria-orientation": "vertical",
        "aria-valuenow": tidy(value),
        "aria-valuemin": span.low,
        "aria-valuemax": span.high,
      });
      mark.style.cursor = "ns-resize";
      part(mark, "title", {}, `${names[block]}: x ${tidy(value)}`);
      mark.addEventListener("keydown", (event) => keyed(event, block));
    });
  }
  const again = () => {
    const held = el.contains(document.activeElement);
    focused = Math.min(focused, values.length - 1);
    draw();
    if (held) svg.querySelectorAll("circle")[focused]?.focus();
  };

  function keyed(event, block) {
    const steps = { ArrowUp: SMALL, ArrowDown: -SMALL, PageUp: LARGE, PageDown: -LARGE };
    const moves = { ArrowLeft: block - 1, ArrowRight: block + 1, Home: 0, End: values.length - 1 };
    const exact = { 0: 0, 1: 1, 2: 2 };
    event.stopPropagation(); // JupyterLab's own keys
    focused = block;
    if (event.key in steps) values[block] = tidy(values[block] + steps[event.key]);
    else if (event.key in exact) values[block] = exact[event.key];
    else if (event.key in moves) {
      choose(Math.min(Math.max(moves[event.key], 0), values.length - 1));
      event.preventDefault();
      return again();
    } else return;
    event.preventDefault();
    choose(block);
    again();
    send();
  }

  function place(event) {
    const box = svg.getBoundingClientRect();
    const [x, y] = [((event.clientX - box.left) / box.width) * WIDTH, ((event.clientY - box.top) / box.height) * HEIGHT];
    const { low, high } = pressed?.span ?? limits();
    const block = Math.floor(((x - LEFT) / (WIDTH - LEFT - RIGHT)) * values.length);
    const value = low + ((HEIGHT - BOTTOM - y) / (HEIGHT - BOTTOM - TOP)) * (high - low);
    return {
      block: Math.min(Math.max(block, 0), values.length - 1),
      value: Math.round(Math.min(Math.max(value, low), high) / 0.01) * 0.01,
    };
  }
  svg.addEventListener("pointerdown", (event) => {
    const { block, value } = place(event);
    const on = event.target.tagName === "circle" ? [...svg.querySelectorAll("circle")].indexOf(event.target) : -1;
    pressed = { block: on >= 0 ? on : block, value, alone: on >= 0, span: limits(), before: [...values] };
    if (!pressed.alone) values[block] = tidy(value);
    choose(pressed.block);
    svg.setPointerCapture(event.pointerId);
    event.preventDefault();
    draw();
    svg.querySelectorAll("circle")[focused].focus();
  });
  svg.addEventListener("pointermove", (event) => {
    if (!pressed) return;
    const { block, value } = place(event);
    if (pressed.alone) values[pressed.block] = tidy(value);
    else {
      // A quick hand leaves out blocks: those between lie on the line from where it was.
      const [from, steps] = [pressed, Math.abs(block - pressed.block)];
      for (let n = steps ? 1 : 0; n <= steps; n++) {
        const share = steps ? n / steps : 1;
        values[from.block + Math.sign(block - from.block) * n] = tidy(from.value + share * (value - from.value));
      }
      pressed = { ...pressed, block, value };
    }
    draw();
  });
  const lifted = () => {
    if (!pressed) return;
    const changed = pressed.before.some((value, block) => value !== values[block]);
    pressed = null;
    if (changed) send();
    again();
  };
  svg.addEventListener("pointerup", lifted);
  svg.addEventListener("pointercancel", lifted);

  model.on("change:values", () => {
    if (pressed) return;
    values = [...model.get("values")];
    again();
  });
  model.on("change:chosen", () => {
    if (model.get("chosen") >= 0) focused = model.get("chosen");
    again();
  });
  for (const name of ["names", "behind", "behind_label", "x_label", "title"]) model.on(`change:${name}`, again);
  draw();
}

export default { render };
