// The page of `lineas serve`: sliders for the maps, and what the model says without and with them, as it says it.
// Everything that comes from the server or the model is put into the page as text, never as markup.

const byId = (id) => document.getElementById(id);
const SIDES = [0, 1]; // unsteered, steered
const boxes = SIDES.map((side) => document.querySelector(`[data-side="${side}"]`));

let served = null; // what is loaded
let histories = [[], []]; // the messages of each side's conversation
let running = null; // the AbortController of what is being generated
let runs = 0; // that have ended
const sliders = new Map(); // by name: { range, exact }

function add(parent, tag, attributes = {}, text = "") {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  parent.append(node);
  return node;
}

const short = (x) => String(Number(Number(x).toPrecision(4)));

function addMaps(maps) {
  maps.forEach((one, k) => {
    const [low, high] = one.range;
    add(byId("maps"), "label", { for: `map-${k}` }, one.name);
    const range = add(byId("maps"), "input", { type: "range", id: `map-${k}`, min: low, max: high, step: (high - low) / 100 });
    const exact = add(byId("maps"), "input", { type: "number", step: "any", required: "", "aria-label": `${one.name}, as a number` });
    const set = (value) => {
      range.value = value;
      exact.value = short(value);
    };
    range.addEventListener("input", () => (exact.value = short(range.value)));
    exact.addEventListener("input", () => exact.value !== "" && (range.value = exact.value));
    const noted = one.calibrated ?? 1;
    const button = add(byId("maps"), "button", { type: "button" }, `${one.calibrated === null ? "fitted" : "calibrated"}: ${short(noted)}`);
    button.setAttribute("aria-label", `${button.textContent}, for ${one.name}`);
    button.addEventListener("click", () => set(noted));
    set(one.strength);
    sliders.set(one.name, exact);
  });
}

const strengths = () => Object.fromEntries([...sliders].map(([name, exact]) => [name, Number(exact.value)]));
const isChat = () => document.querySelector("[name=kind]:checked").value === "chat";

function showKind() {
  byId("system-box").hidden = byId("clear").hidden = !isChat();
  byId("prompt-label").textContent = isChat() ? "Message" : "Text to continue";
  clear();
}

function clear() {
  running?.abort();
  histories = [[], []];
  boxes.forEach((box) => box.replaceChildren());
  byId("error").textContent = byId("status").textContent = "";
}

// The data of server-sent events, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

async function* answer(path, body, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const found = JSON.parse(data);
    if (found.error) throw new Error(found.error.message);
    yield found.choices[0];
  }
  throw new Error("the server went away");
}

// One side's answer, into its box; returns its text.
async function generate(side, prompt, settings, signal) {
  const box = boxes[side];
  const history = histories[side]; // which a new conversation replaces
  const steering = side ? { lineas: { maps: [...sliders.keys()], strength: strengths() } } : {};
  const body = { model: served.model, ...settings, ...steering };
  const chat = isChat();
  if (chat) {
    const system = byId("system").value;
    body.messages = [...(system ? [{ role: "system", content: system }] : []), ...history, { role: "user", content: prompt }];
    add(box, "p", { class: "user" }, prompt);
  } else {
    body.prompt = prompt;
    box.replaceChildren();
  }
  const place = add(box, "p", { class: "made" });
  if (!chat) add(place, "span", { class: "given" }, prompt);
  const made = add(place, "span");
  let text = "";
  try {
    for await (const choice of answer(chat ? "v1/chat/completions" : "v1/completions", body, signal)) {
      text += choice.text ?? choice.delta.content ?? "";
      made.textContent = text;
      if (choice.finish_reason === "length") add(place, "span", { class: "note" }, " (cut here)");
    }
  } catch (error) {
    add(place, "span", { class: "note" }, signal.aborted ? " (stopped)" : " (failed)");
    if (!signal.aborted) throw error;
  }
  if (chat) history.push({ role: "user", content: prompt }, { role: "assistant", content: text });
}

async function send() {
  if (running || !byId("form").reportValidity()) return;
  const prompt = byId("prompt").value;
  const any = Math.floor(Math.random() * 2 ** 31); // the same for both sides
  const settings = {
    max_tokens: Number(byId("max-tokens").value),
    temperature: Number(byId("temperature").value),
    top_p: Number(byId("top-p").value),
    seed: byId("seed").value === "" ? any : Number(byId("seed").value),
  };
  const control = (running = new AbortController());
  byId("error").textContent = "";
  byId("status").textContent = "Generating";
  byId("stop").disabled = false;
  byId("send").disabled = true;
  document.body.dataset.state = "busy";
  const ends = await Promise.allSettled(SIDES.map((side) => generate(side, prompt, settings, control.signal)));
  const failed = ends.find((end) => end.status === "rejected");
  if (failed) byId("error").textContent = failed.reason.message;
  else if (isChat() && !control.signal.aborted) byId("prompt").value = "";
  byId("status").textContent = failed ? "Failed" : control.signal.aborted ? "Stopped" : `Done, with seed ${settings.seed}`;
  byId("stop").disabled = true;
  byId("send").disabled = false;
  running = null;
  document.body.dataset.state = "idle";
  document.body.dataset.runs = ++runs;
}

async function start() {
  try {
    served = await (await fetch("lineas")).json();
  } catch (error) {
    byId("error").textContent = `The server does not answer: ${error.message}`;
    return;
  }
  document.title = byId("model").textContent = served.model;
  byId("facts").textContent = served.context_length ? `at most ${served.context_length} tokens` : "";
  addMaps(served.maps);
  if (!served.chat) {
    document.querySelector("[value=completion]").checked = true;
    byId("kinds").hidden = true;
  }
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("clear").addEventListener("click", clear);
  byId("kinds").addEventListener("change", showKind);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      byId("form").requestSubmit();
    }
  });
  showKind();
  document.body.dataset.state = "idle";
}

start();
