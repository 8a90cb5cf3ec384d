// The browser's half of lineas.explore: draws what explorer.py sends, and says which point and strength are chosen.
// Lengths are in units of a drawing 960 wide, which is scaled to the width of the notebook's cell.

const WIDTH = 960;
const LEFT = 74;
const SVG = "http://www.w3.org/2000/svg";
// Of Okabe and Ito's palette, as in explorer.css. A canvas that is not in the page yet cannot ask the style sheet.
const blue = () => (document.body.dataset.jpThemeLight === "false" ? "#56b4e9" : "#0072b2");

function add(parent, node, attributes, text) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  parent.append(node);
  return node;
}

const html = (parent, tag, attributes = {}, text = "") => add(parent, document.createElement(tag), attributes, text);
const svg = (parent, tag, attributes = {}, text = "") =>
  add(parent, document.createElementNS(SVG, tag), attributes, text);

function tell(model, name, value) {
  model.set(name, value);
  model.save_changes();
}

function number(x, digits = 3) {
  if (x === null) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  return size >= 1e5 || size < 1e-3 ? x.toExponential(digits - 1) : String(Number(x.toPrecision(digits)));
}

const signed = (x) => (Math.abs(x) < 1e3 ? x.toFixed(3) : x.toPrecision(4)).replace("-", "−");

const share = (part, whole) => `${((100 * part) / whole).toFixed(part * 100 < whole * 10 ? 2 : 1)} %`;

const percent = (part, whole) => `${(100 * part) / whole}%`;

// Binary data comes as a DataView that need not be aligned.
const counts = (view) => new Uint32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));

const shorten = (text, most) => (text.length > most ? `…${text.slice(1 - most)}` : text);

// Round values between `low` and `high`, about `count` of them.
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

// A heat map with one pixel a cell, which the browser enlarges. `part(row, column)` is from 0 to 1.
function paint(canvas, rows, columns, part) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  context.fillStyle = blue();
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const value = part(row, column);
      context.globalAlpha = value > 0 ? 0.25 + 0.75 * value : 0.055;
      context.fillRect(column, row, 1, 1);
    }
  }
}

function controls(root, model, path, id) {
  const box = html(root, "div", { class: "lx-controls" });
  const slider = (name, label, settings) => {
    html(box, "label", { for: `${id}-${name}` }, label);
    const input = html(box, "input", { type: "range", id: `${id}-${name}`, ...settings });
    const output = html(box, "output", { for: `${id}-${name}` });
    input.addEventListener("input", () => tell(model, name, Number(input.value)));
    return { input, output };
  };
  const last = path.support.length - 1;
  const sparsity = last ? slider("index", "Sparsity", { min: 0, max: last, step: 1 }) : null;
  const strength = slider("strength", "Strength", { min: 0, max: path.maxStrength, step: 0.05 });
  if (path.calibrated !== null) {
    const marks = html(box, "datalist", { id: `${id}-marks` });
    html(marks, "option", { value: path.calibrated, label: "calibrated" });
    strength.input.setAttribute("list", marks.id);
    // The slider moves in steps: this sets the very number.
    strength.calibrated = html(document.createDocumentFragment(), "button", { class: "lx-mark", type: "button" });
    strength.calibrated.textContent = `calibrated: ${number(path.calibrated)}`;
    strength.calibrated.addEventListener("click", () => tell(model, "strength", path.calibrated));
  }
  return { sparsity, strength };
}

// The drawing: curves and heat map of the path on the left, changed neurons in the middle, a list on the right.
function pictures(root, model, path) {
  const modules = path.widths.length;
  const points = path.support.length;
  const total = path.widths.reduce((a, b) => a + b);
  const onPath = points > 1;
  const mapTop = onPath ? 196 : 76;
  const mapHeight = Math.max(40, modules * Math.max(4, Math.min(60, Math.floor(230 / modules))));
  const below = mapTop + mapHeight;
  const listRow = 29;
  const height = Math.max(below + 40, 36 + path.rows * listRow + 8);
  const curve = { x: LEFT, y: 28, width: 286, height: 126 };
  const along = { x: LEFT, y: mapTop, width: 286, height: mapHeight };
  const cells = { x: onPath ? 388 : LEFT, y: mapTop, width: onPath ? 306 : 620, height: mapHeight };
  const list = { x: 730, width: WIDTH - 730 };

  const stage = html(root, "div", { class: "lx-stage" });
  const drawing = svg(stage, "svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img" });
  const text = (x, y, className, words = "") => svg(drawing, "text", { x, y, class: className }, words);
  const line = (x1, x2, y, className) => svg(drawing, "line", { x1, x2, y1: y, y2: y, class: className });
  const place = (node, box) =>
    Object.assign(node.style, {
      left: percent(box.x, WIDTH),
      width: percent(box.width, WIDTH),
      top: percent(box.y, height),
      height: percent(box.height, height),
    });
  const canvas = (box) => {
    const node = html(stage, "canvas", { "aria-hidden": "true" });
    place(node, box);
    return node;
  };
  const pointX = (k) => along.x + ((k + 0.5) / points) * along.width;

  // What never changes: names of modules, titles, axes.
  const every = Math.ceil((modules * 12) / mapHeight);
  for (let row = 0; row < modules; row += every) {
    const y = cells.y + ((row + 0.5) * mapHeight) / modules + 4;
    svg(text(LEFT - 6, y, "lx-right lx-quiet", shorten(path.labels[row], 11)), "title", {}, path.names[row]);
  }
  text(cells.x, mapTop - 8, "lx-title", "Changed neurons");
  text(cells.x + cells.width, below + 14, "lx-right lx-quiet", "last");
  text(cells.x, below + 14, "lx-quiet", "first");
  text(cells.x + cells.width / 2, below + 14, "lx-middle lx-quiet", "neurons of a module");
  if (path.pattern) text(cells.x, below + 30, "lx-quiet", `rows: ${path.pattern}`);
  const cellMap = canvas(cells);

  // Colour scale, beside the title of the cells.
  const scaleBox = { x: cells.x + cells.width - 96, y: mapTop - 17, width: 60, height: 10 };
  const scale = canvas(scaleBox);
  text(scaleBox.x - 5, mapTop - 8, "lx-right lx-quiet", "0");
  text(cells.x + cells.width, mapTop - 8, "lx-right lx-quiet", "100 %");
  const drawn = [() => paint(scale, 1, 30, (_, column) => column / 29)]; // pictures that change with the theme alone

  // The list: module, neuron, slope, shift.
  const columns = [list.x, list.x + 116, list.x + 174, WIDTH];
  const listed = (y, className, words = []) =>
    columns.map((x, k) => text(x, y, `${k ? "lx-right" : ""} ${className}`, words[k]));
  text(list.x, 16, "lx-title", "Most changed neurons");
  listed(36, "lx-quiet", [path.names[0] ? "module" : "", "neuron", "slope", "shift"]);
  line(list.x, WIDTH, 42, "lx-axis");
  const rows = Array.from({ length: path.rows }, (_, k) => {
    const y = 48 + k * listRow;
    const [groove, bar] = ["lx-groove", "lx-bar"].map((className) =>
      svg(drawing, "rect", { x: list.x, y: y + 19, height: 3, width: list.width, class: className }),
    );
    return { groove, bar, words: listed(y + 13, "") };
  });

  // What is said of the point.
  const said = { x: cells.x, y: onPath ? 54 : 16 };
  const big = text(said.x, said.y, "lx-big");
  const lines = [0, 1, 2, 3].map((k) => text(said.x, said.y + 24 + 19 * k, ""));

  let cursor = [];
  const dots = [];
  if (onPath) {
    text(said.x, 16, "lx-title", "This point");
    text(curve.x, 16, "lx-title", "Loss along the path");
    const finite = [...path.loss, ...(path.heldOut ?? [])].filter((value) => value !== null);
    const low = Math.min(...finite);
    const span = Math.max(...finite) - low || 1;
    const lossY = (value) => curve.y + curve.height * (0.95 - (0.9 * (value - low)) / span);
    for (const value of finite.length ? ticks(low, low + span, 4) : []) {
      line(curve.x, curve.x + curve.width, lossY(value), "lx-axis");
      text(LEFT - 6, lossY(value) + 4, "lx-right lx-quiet", String(value));
    }
    const series = [{ values: path.loss, className: "", name: "fitted", x: curve.x + curve.width - 132 }];
    if (path.heldOut)
      series.push({ values: path.heldOut, className: "lx-held-out", name: "held out", x: curve.x + curve.width - 62 });
    for (const { values, className, name, x } of series) {
      const corners = values.map((value, k) => (value === null ? "" : `${pointX(k)},${lossY(value)}`));
      svg(drawing, "polyline", { points: corners.join(" "), class: `lx-curve ${className}` });
      if (series.length === 1) continue; // one curve needs no legend
      line(x - 4, x + 14, 12, `lx-curve ${className}`);
      text(x + 18, 16, "lx-quiet", name);
    }
    for (const { values, className } of series) // above all curves
      dots.push({ values, lossY, node: svg(drawing, "circle", { r: 5, class: `lx-dot ${className}` }) });

    text(along.x, mapTop - 8, "lx-title", "Changed share of each module");
    const shown = [...new Set([0, 1, 2, 3].map((k) => Math.round((k * (points - 1)) / 3)))];
    shown.forEach((k, i) => {
      const anchor = i === 0 ? "" : i === shown.length - 1 ? "lx-right" : "lx-middle";
      const x = i === 0 ? along.x : i === shown.length - 1 ? along.x + along.width : pointX(k);
      text(x, below + 14, `${anchor} lx-quiet`, number(path.penalties[k], 2));
    });
    text(along.x + along.width / 2, below + 30, "lx-middle lx-quiet", "sparser   ←   penalty   →   denser");
    const map = canvas(along);
    const support = counts(path.moduleSupport);
    drawn.push(() => paint(map, modules, points, (row, k) => support[k * modules + row] / path.widths[row]));

    // Points can also be chosen in the pictures themselves. Over the canvases, which lie above the drawing.
    const tall = below - curve.y;
    const top = html(stage, "div", { class: "lx-over" });
    place(top, { x: along.x, y: curve.y, width: along.width, height: tall });
    const choose = (event) => {
      const box = top.getBoundingClientRect();
      const k = Math.floor((points * (event.clientX - box.left)) / box.width);
      tell(model, "index", Math.max(0, Math.min(points - 1, k)));
    };
    top.addEventListener("pointerdown", (event) => {
      top.setPointerCapture(event.pointerId);
      choose(event);
    });
    top.addEventListener("pointermove", (event) => event.buttons && choose(event));
    cursor = [curve, along].map((box) => {
      const node = html(top, "div", { class: "lx-cursor" });
      return Object.assign(node.style, { top: percent(box.y - curve.y, tall), height: percent(box.height, tall) });
    });
  }

  function drawPoint() {
    const k = model.get("index");
    big.textContent = `${path.support[k].toLocaleString("en")} neurons`;
    lines[0].textContent = `of ${total.toLocaleString("en")} changed, ${share(path.support[k], total)}`;
    if (onPath) {
      lines[1].textContent = `penalty ${number(path.penalties[k])}`;
      lines[2].textContent = `loss ${number(path.loss[k], 4)}`;
      lines[3].textContent = path.heldOut ? `held-out loss ${number(path.heldOut[k], 4)}` : "";
      for (const style of cursor) style.left = percent(k + 0.5, points);
      for (const { node, values, lossY } of dots) {
        node.style.display = values[k] === null ? "none" : "";
        node.setAttribute("cx", pointX(k));
        node.setAttribute("cy", lossY(values[k]));
      }
    }
    drawing.setAttribute("aria-label", `${path.support[k]} of ${total} neurons changed, loss ${number(path.loss[k])}`);
  }

  function drawCells() {
    const changed = counts(model.get("_point_data").cells);
    const count = path.columns;
    paint(cellMap, modules, count, (row, column) => {
      const start = Math.floor((column * path.widths[row]) / count);
      const stop = Math.floor(((column + 1) * path.widths[row]) / count);
      return changed[row * count + column] / Math.max(stop - start, 1);
    });
  }

  function drawList() {
    const strength = model.get("strength");
    const found = model.get("_point_data").top;
    const size = ([, , weight, bias]) => Math.hypot(weight - 1, bias);
    rows.forEach(({ groove, bar, words }, k) => {
      const row = found[k];
      bar.setAttribute("width", row ? (list.width * size(row)) / size(found[0]) : 0);
      groove.style.display = row ? "" : "none";
      for (const node of words) node.textContent = "";
      if (!row) return;
      const [module, neuron, weight, bias] = row;
      const name = shorten(path.labels[module], 14);
      const said = [name, neuron, signed(1 + strength * (weight - 1)), signed(strength * bias)];
      words.forEach((node, column) => (node.textContent = said[column]));
      svg(words[0], "title", {}, path.names[module]);
    });
  }

  const drawTheme = () => drawn.forEach((draw) => draw());
  return { drawPoint, drawCells, drawList, drawTheme };
}

// The prompt, and its continuations without and with the maps.
function texts(root, model, id) {
  const box = html(root, "div", { class: "lx-text" });
  const ask = html(box, "div", { class: "lx-ask" });
  html(ask, "label", { for: `${id}-prompt` }, "Prompt");
  const prompt = html(ask, "input", { type: "text", id: `${id}-prompt` });
  const live = html(html(ask, "label", { class: "lx-live" }), "input", { type: "checkbox" });
  live.parentNode.append(" follow the sliders");
  const button = html(ask, "button", {}, "Generate");
  const panel = (className, title) => {
    const said = html(box, "div", { class: `lx-said ${className}` });
    return { title: html(said, "h4", {}, title), words: html(said, "p", { "aria-live": "polite" }) };
  };
  const unsteered = panel("", "Unsteered");
  const steered = panel("lx-steered", "Steered");
  const gate = html(box, "p", { class: "lx-gate" });
  const status = html(box, "div", { class: "lx-status", role: "status" });

  // With all that is shown: messages about sliders may still wait their turn.
  function generate(renew) {
    const chosen = { prompt: prompt.value, index: model.get("index"), strength: model.get("strength") };
    model.send({ type: "generate", renew, ...chosen });
  }
  button.addEventListener("click", () => generate(true));
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !button.disabled) generate(true);
    event.stopPropagation(); // a notebook has shortcuts of one letter
  });
  prompt.addEventListener("change", () => tell(model, "prompt", prompt.value));
  live.addEventListener("change", () => {
    tell(model, "live_text", live.checked);
    if (live.checked) generate(false);
  });

  function drawText() {
    const text = model.get("_text_data");
    const attached = model.get("_attached");
    const busy = text.state === "busy";
    box.classList.toggle("lx-busy", busy);
    button.disabled = busy || !attached;
    status.classList.toggle("lx-error", text.state === "error");
    if (!attached) status.textContent = "The maps were taken off the model.";
    else if (busy) status.textContent = "Generating …";
    else if (text.state === "error") status.textContent = text.message;
    else if (text.state === "idle") status.textContent = "";
    else if (text.index !== model.get("index") || text.strength !== model.get("strength"))
      status.textContent = "The sliders have moved since: generate again.";
    else if (text.unsteered === text.steered) status.textContent = "Both texts are the same.";
    else status.textContent = "Marked: from where the texts differ.";
    steered.title.textContent = "unsteered" in text ? `Steered, strength ${number(text.strength)}` : "Steered";
    const before = text.unsteered ?? "";
    const after = text.steered ?? "";
    let same = 0;
    while (same < Math.min(before.length, after.length) && before[same] === after[same]) same++;
    if (same < Math.max(before.length, after.length)) same = before.lastIndexOf(" ", same - 1) + 1;
    for (const [{ words }, said] of [[unsteered, before], [steered, after]]) {
      words.replaceChildren(said.slice(0, same));
      if (same < said.length) html(words, "mark", {}, said.slice(same));
    }
    // Where the maps have gates: the tokens of the prompt, the more coloured the further the gate is open.
    const tokens = text.gate ?? [];
    gate.replaceChildren(tokens.length ? "Gate: " : "");
    for (const [token, value] of tokens) {
      const percent = Math.round(100 * value);
      const style = `background: color-mix(in srgb, var(--lx-orange) ${Math.round(0.7 * percent)}%, transparent)`;
      html(gate, "span", { style, title: `open by ${percent} %` }, token);
    }
    root.dataset.text = text.state;
  }
  function drawPrompt() {
    if (document.activeElement !== prompt) prompt.value = model.get("prompt");
    live.checked = model.get("live_text");
  }
  return { drawText, drawPrompt, generate };
}

function render({ model, el }) {
  const path = model.get("_path_data");
  // Each explorer has a module of its own, so that a counter would give the same id to all.
  const id = `lineas-explorer-${Math.random().toString(36).slice(2)}`;
  const root = html(el, "div", { class: "lineas-explorer" });
  const { sparsity, strength } = controls(root, model, path, id);
  const { drawPoint, drawCells, drawList, drawTheme } = pictures(root, model, path);
  const said = path.text ? texts(root, model, id) : null;

  function onIndex() {
    const k = model.get("index");
    if (sparsity) {
      const words = `point ${k + 1} of ${path.support.length}`;
      sparsity.input.value = k;
      sparsity.input.setAttribute("aria-valuetext", `${words}, ${path.support[k]} neurons changed`);
      sparsity.output.textContent = words;
    }
    drawPoint();
    said?.drawText();
  }
  function onPoint() {
    drawCells();
    drawList();
    root.dataset.point = model.get("_point_data").index;
  }
  function onStrength() {
    const value = model.get("strength");
    strength.input.min = Math.min(0, value);
    strength.input.max = Math.max(path.maxStrength, value, path.calibrated ?? 0);
    strength.input.value = value;
    const named = value === 0 ? ", off" : value === path.calibrated ? ", calibrated" : value === 1 ? ", as fitted" : "";
    strength.output.replaceChildren(`${value.toFixed(2)}${named} `);
    if (strength.calibrated && value !== path.calibrated) strength.output.append(strength.calibrated);
    drawList();
    said?.drawText();
    root.dataset.strength = value;
  }
  const listeners = [["index", onIndex], ["_point_data", onPoint], ["strength", onStrength]];
  if (said) {
    listeners.push(["_text_data", said.drawText], ["_attached", said.drawText]);
    listeners.push(["prompt", said.drawPrompt], ["live_text", said.drawPrompt]);
    said.drawPrompt();
    for (const slider of [sparsity, strength]) {
      slider?.input.addEventListener("change", () => model.get("live_text") && said.generate(false));
    }
  }
  for (const [name, listener] of listeners) model.on(`change:${name}`, listener);
  onIndex();
  onPoint();
  onStrength();
  drawTheme();
  const theme = new MutationObserver(() => {
    drawTheme();
    drawCells();
  });
  theme.observe(document.body, { attributeFilter: ["data-jp-theme-light"] });
  return () => {
    theme.disconnect();
    for (const [name, listener] of listeners) model.off(`change:${name}`, listener);
  };
}

export default { render };
