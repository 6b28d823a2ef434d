// What ComfyUI's editor does not do by itself for these nodes: show what a node said below it, and keep every digit of
// a number. Loaded by ComfyUI from WEB_DIRECTORY; see ComfyUI's documentation of JavaScript extensions.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const REPORT = "said";
const WARNING = /(^|\n)\s*(warning|note|no recipe)/i;

// Digits after the point that a number needs to be shown in full: 17.11 has 2, and arrows go in steps of the widget.
function digits(value) {
  const [mantissa, exponent] = String(Number(value)).split("e");
  const own = (mantissa.split(".")[1] ?? "").length - Number(exponent ?? 0);
  return Math.min(Math.max(own, 1), 15);
}

function keepDigits(widget) {
  widget.options.round = 0; // the editor rounds to the step unless this is nothing
  widget.options.step = 1;
  widget.options.step2 = 0.1;
  Object.defineProperty(widget.options, "precision", { get: () => digits(widget.value), set: () => {}, enumerable: true });
}

// A node of the graph, or of a graph inside one of its nodes: 7, or 5:3.
function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph, node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

function show(node, text, failed = false) {
  let widget = node.widgets?.find((one) => one.name === REPORT);
  if (!widget) {
    widget = ComfyWidgets.STRING(node, REPORT, ["STRING", { multiline: true }], app).widget;
    widget.serialize = false; // neither in the file nor in the graph that is sent
    widget.options.serialize = false;
    if (widget.element) {
      widget.element.readOnly = true;
      widget.element.style.fontFamily = "monospace";
    }
  }
  widget.value = text;
  if (widget.element) {
    widget.element.style.whiteSpace = failed ? "pre-wrap" : "pre"; // a report has columns
    widget.element.style.borderLeft = failed || WARNING.test(text) ? "4px solid #d55e00" : "none";
  }
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, 360), Math.max(node.size[1], height + 60)]);
  node.graph?.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "alkahest",
  setup() {
    // The editor's own notice says that a node failed; why, only behind a button.
    api.addEventListener("execution_error", ({ detail }) => {
      const node = detail?.node_type?.startsWith("Alkahest") && nodeOf(detail.node_id);
      if (node) show(node, detail.exception_message, true);
    });
  },
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("Alkahest")) return;
    for (const widget of node.widgets ?? []) {
      if (widget.type === "number" && widget.options?.round) keepDigits(widget);
    }
  },
  beforeRegisterNodeDef(type, definition) {
    if (!definition.name.startsWith("Alkahest")) return;
    const before = type.prototype.onExecuted;
    type.prototype.onExecuted = function (output) {
      before?.apply(this, arguments);
      if (output?.text) show(this, [output.text].flat().join("\n"));
    };
  },
});
