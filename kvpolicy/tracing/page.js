"use strict";
// What happens on the page. `seen` is the number of tokens that went through the model at the moment
// that is shown; a head holds a token where it was seen, and not dropped yet.

const $ = (id) => document.getElementById(id);
const trace = JSON.parse($("trace").textContent);
const { heads, evictions, steps, pieces } = trace;
const state = { now: steps.length - 1, token: -1, head: 0, cell: null, colour: "held" };
let data = null; // typed arrays, one line a head: see open()
let spans = [];
let columns = { held: [], safe: [] };

// ---------------------------------------------------------------- reading

/** Return a packed array: {line(h): typed array of one head, all}. */
async function unpacked(what) {
  const bytes = Uint8Array.from(atob(what.data), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = await new Response(stream).arrayBuffer();
  if (what.type !== "float16") {
    return new { uint8: Uint8Array, int16: Int16Array, int32: Int32Array }[what.type](raw);
  }
  return Float32Array.from(new Uint16Array(raw), (h) => halfFloat(h) * what.scale);
}

function halfFloat(h) {
  const exponent = (h >> 10) & 31, fraction = h & 1023, sign = h >> 15 ? -1 : 1;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

async function open() {
  const [dropped, values, first, last] = await Promise.all(
    [trace.dropped, trace.values, trace.protected_first, trace.protected_last].map(unpacked));
  const size = trace.dropped.shape[1];
  const until = Float64Array.from(dropped, (e) => (e ? evictions[e - 1] : Infinity));
  data = { size, dropped, until, values, first, last, most: steps.at(-1) };
}

// ---------------------------------------------------------------- what is held

const seenNow = () => steps[state.now];
const evictionNow = () => evictions.filter((at) => at <= seenNow()).length;
const isHeld = (at, p, seen) => p < seen && data.until[at] > seen;
const isSafe = (at, e) => data.first[at] > 0 && data.first[at] <= e && data.last[at] >= e;
const lifetime = (at, p) => Math.min(data.until[at], data.most) - p;
const called = ([layer, head]) => `layer ${layer}, head ${head}`;
const bytes = (n) => { const power = Math.min(3, Math.floor(Math.log10(Math.max(n, 1)) / 3)); return `${short(n / 1000 ** power)} ${["B", "kB", "MB", "GB"][power]}`; };
const visible = (text) => text.replace(/^ +$/, (all) => "␣".repeat(all.length)).replace(/\n/g, "↵").replace(/\t/g, "⇥") || "·";

function count() {
  const seen = seenNow(), e = evictionNow(), held = new Uint16Array(data.size), safe = new Uint16Array(data.size);
  let low = Infinity, high = 0;
  for (let h = 0, at = 0; h < heads.length; h++) {
    let mine = 0;
    for (let p = 0; p < data.size; p++, at++) {
      if (!isHeld(at, p, seen)) continue;
      held[p]++; mine++;
      if (isSafe(at, e)) safe[p]++;
    }
    low = Math.min(low, mine); high = Math.max(high, mine);
  }
  columns = { held, safe, low, high };
}

// ---------------------------------------------------------------- the text

function writeText() {
  spans = pieces.map((piece, p) => {
    const span = document.createElement("span");
    span.id = `t${p}`;
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    span.textContent = piece.replace(/\n/g, "↵\n") || "·";
    span.dataset.p = p;
    if (!piece.trim()) span.setAttribute("aria-label", visible(piece)); // what is nothing to hear otherwise
    $(p < trace.prompt_length ? "prompt" : "written").append(span);
    return span;
  });
}

function paintText() {
  const seen = seenNow(), n = heads.length;
  spans.forEach((span, p) => {
    const known = p < data.size, held = known ? columns.held[p] : 0, safe = known ? columns.safe[p] : 0;
    const look = p >= seen ? "later" : held ? `${held} ${safe}` : "gone";
    if (span.dataset.look === look) return;
    span.dataset.look = look;
    span.classList.toggle("later", look === "later");
    span.classList.toggle("gone", look === "gone");
    span.style.setProperty("--share", Math.sqrt(held / n)); // one head of a hundred is seen, too
    span.style.setProperty("--safe", Math.sqrt(safe / n));
  });
}

function describe(p) {
  const whose = p < trace.prompt_length ? "of the prompt" : "written by the model";
  if (p >= data.size) return { whose, held: "never given to the model: it was the last one written" };
  if (p >= seenNow()) return { whose, held: "not seen yet" };
  const lives = [], first = p;
  let largest = 0, safe = 0;
  for (let h = 0; h < heads.length; h++) {
    const at = h * data.size + first;
    lives.push(lifetime(at, p));
    if (data.first[at]) safe++;
    if (data.values[at] > data.values[largest * data.size + p]) largest = h;
  }
  lives.sort((a, b) => a - b);
  const layers = new Set(heads.filter((_, h) => isHeld(h * data.size + p, p, seenNow())).map(([layer]) => layer));
  return {
    whose,
    held: `${columns.held[p]} of ${heads.length} heads, in ${layers.size} of ${new Set(heads.map(([l]) => l)).size} layers`,
    life: `${lives[0]} to ${lives.at(-1)} tokens, ${lives[lives.length >> 1]} in the median head`,
    safe: safe ? `at some time, in ${safe} heads` : "never",
    value: `${short(data.values[largest * data.size + p])} in ${called(heads[largest])}`,
  };
}

function choose(p, { scroll = false } = {}) {
  const old = spans[state.token];
  if (old) { old.classList.remove("chosen"); old.setAttribute("aria-selected", "false"); }
  state.token = Math.max(0, Math.min(spans.length - 1, p));
  const span = spans[state.token], facts = describe(state.token);
  span.classList.add("chosen");
  span.setAttribute("aria-selected", "true");
  span.setAttribute("aria-label", `${visible(pieces[state.token])}, position ${state.token}, ${facts.whose}, ${facts.life ? "held by " : ""}${facts.held}` + (facts.life ? `, lifetime ${facts.life}` : ""));
  $("tokens").setAttribute("aria-activedescendant", span.id);
  if (scroll) span.scrollIntoView({ block: "nearest" });
  paintCard(facts);
  drawMap();
}

function paintCard(facts) {
  const p = state.token, code = document.createElement("code");
  code.textContent = visible(pieces[p]);
  $("chosen").replaceChildren(code);
  const rows = [["position", `${p}, ${facts.whose}`], ["held by", facts.held], ["lifetime", facts.life], ["protected", facts.safe], ["largest value", facts.value]];
  const list = document.createElement("dl");
  for (const [name, value] of rows.filter(([, value]) => value)) list.append(element("dt", name), element("dd", value));
  $("facts").replaceChildren(list);
  drawGrid(p);
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function moveInText(event) {
  const p = state.token, lines = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  let to = { ArrowLeft: p - 1, ArrowRight: p + 1, Home: 0, End: spans.length - 1 }[event.key];
  if (lines) {
    const box = spans[Math.max(p, 0)].getBoundingClientRect();
    to = p;
    let best = Infinity;
    for (let q = p + lines; spans[q]; q += lines) {
      const other = spans[q].getBoundingClientRect();
      const down = (other.top - box.top) * lines;
      if (down > box.height * 2.5) break;
      const far = Math.abs(other.left - box.left) + (down < 4 ? Infinity : 0);
      if (far < best) { best = far; to = q; }
    }
    if (to === p) to = p + lines;
  }
  if (to === undefined) return;
  event.preventDefault();
  choose(to, { scroll: true });
}

// ---------------------------------------------------------------- words and numbers

function writeHead() {
  const written = pieces.length - trace.prompt_length, run = trace.run;
  $("lede").textContent = `${run.model.split("/").at(-1)} wrote ${written.toLocaleString("en")} tokens behind a prompt of ${trace.prompt_length.toLocaleString("en")}. ` +
    `Each of its ${heads.length} KV heads chose for itself what to keep; ${evictions.length.toLocaleString("en")} evictions dropped the rest, and nothing that was dropped returned.`;
  $("policy").textContent = run.policy;
  const rows = Object.entries({ ...run, ...run.versions }).filter(([name, value]) => name !== "versions" && value !== null);
  $("run").replaceChildren(...rows.flatMap(([name, value]) => [element("dt", name.replace(/_/g, " ")), element("dd", String(value))]));
}

function writeTable() {
  const titles = ["eviction", "tokens seen", "held, per head", "of the full cache", "held by any head"];
  const rows = evictions.map((seen, i) => {
    let sum = 0, any = 0;
    for (let p = 0; p < seen; p++) {
      let mine = 0;
      for (let h = 0; h < heads.length; h++) mine += isHeld(h * data.size + p, p, seen);
      sum += mine; any += mine > 0;
    }
    return [i + 1, seen, short(sum / heads.length), `${short(100 * sum / heads.length / seen)} %`, `${any} of ${seen}`];
  });
  const row = (cells, name) => { const made = document.createElement("tr"); made.append(...cells.map((c) => element(name, c))); return made; };
  const head = document.createElement("thead"), body = document.createElement("tbody");
  head.append(row(titles, "th"));
  body.append(...rows.map((cells) => row(cells, "td")));
  $("table").replaceChildren(element("caption", "After each eviction"), head, body);
}

function tell() {
  const seen = seenNow(), e = evictionNow(), { low, high } = columns, share = 100 * trace.nbytes[state.now] / trace.full_nbytes[state.now];
  const slots = low === high ? `${low} tokens a head` : `${low} to ${high} tokens a head`;
  $("readout").innerHTML = `<b>${short(seen)}</b> of ${short(data.most)} tokens seen · eviction <b>${e}</b> of ${evictions.length} · <b>${slots}</b> · ${bytes(trace.nbytes[state.now])}, ${short(share)} % of the full cache`;
  $("moment").setAttribute("aria-valuetext", `${seen} tokens seen, eviction ${e} of ${evictions.length}, ${slots}`);
}

function writeMapKey() {
  const key = { held: [["held", "--deep"], ["protected", "--guard"], ["dropped", "--gone"]] }[state.colour];
  $("mapkey").innerHTML = key ? key.map(([name, c]) => `<span class="key" style="--swatch: var(${c}); margin-left: 0">${name}</span>`).join("")
    : `<span>${state.colour === "life" ? "dropped at once" : "smallest of the head"}</span><span class="ramp strong"${state.colour === "value" ? ' style="background: linear-gradient(90deg, var(--none), var(--guard))"' : ""}></span><span>${state.colour === "life" ? "held from first to last" : "largest of the head"}</span>`;
}

// ---------------------------------------------------------------- the moment

let charts = 0;
function show(now) {
  state.now = Math.max(0, Math.min(steps.length - 1, now));
  $("moment").value = state.now;
  count(); tell(); paintText(); tellCell();
  cancelAnimationFrame(charts); // what was to be drawn of the moment before
  charts = requestAnimationFrame(() => { drawWhere(); drawValues(); drawMemory(); });
  if (playing) follow();
  choose(state.token);
}

/** Scroll the text, and not the page, to the newest token. */
function follow() {
  const box = $("tokens"), span = spans[Math.min(seenNow(), spans.length) - 1];
  const down = span.getBoundingClientRect().bottom - box.getBoundingClientRect().bottom + 40;
  const up = span.getBoundingClientRect().top - box.getBoundingClientRect().top - 40;
  if (down > 0 || up < 0) box.scrollTop += down > 0 ? down : up;
}

/** Return the step of the eviction before or behind the moment, or the end. */
function evictionFrom(direction) {
  const at = evictions.map((seen) => steps.indexOf(seen));
  return direction > 0 ? at.find((i) => i > state.now) ?? steps.length - 1 : at.findLast((i) => i < state.now) ?? 0;
}

let playing = null;
function play(on) {
  clearInterval(playing);
  playing = null;
  $("play").textContent = on ? "❚❚" : "▶";
  $("play").setAttribute("aria-label", on ? "Pause" : "Play");
  if (!on) return;
  if (state.now === steps.length - 1) show(0);
  playing = setInterval(() => { show(state.now + Math.max(1, Math.round(steps.length / 400))); if (state.now === steps.length - 1) play(false); }, 60);
}

function listen() {
  $("moment").addEventListener("input", (event) => { play(false); show(Number(event.target.value)); });
  $("moment").addEventListener("keydown", (event) => {
    const direction = { PageUp: 1, PageDown: -1 }[event.key];
    if (direction) { event.preventDefault(); play(false); show(evictionFrom(direction)); }
  });
  $("before").addEventListener("click", () => { play(false); show(evictionFrom(-1)); });
  $("after").addEventListener("click", () => { play(false); show(evictionFrom(1)); });
  $("play").addEventListener("click", () => play(playing === null));
  $("tokens").addEventListener("keydown", moveInText);
  $("tokens").addEventListener("pointerover", (event) => { const p = event.target.dataset.p; if (p !== undefined) choose(Number(p)); });
  $("map").addEventListener("pointermove", pointAtMap);
  $("map").addEventListener("pointerdown", pointAtMap);
  $("map").addEventListener("pointerleave", () => { state.cell = null; tellCell(); drawMap(); });
  $("map").addEventListener("keydown", moveOnMap);
  $("head").addEventListener("change", (event) => { state.head = Number(event.target.value); drawValues(); });
  for (const radio of document.querySelectorAll("[name=colour]")) radio.addEventListener("change", () => { state.colour = radio.value; writeMapKey(); drawMap(); });
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const named = () => document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  const redraw = () => { $("theme").textContent = named() === "dark" ? "Light" : "Dark"; readColours(); drawLives(); writeMapKey(); show(state.now); };
  $("theme").addEventListener("click", () => { document.documentElement.dataset.theme = named() === "dark" ? "light" : "dark"; redraw(); });
  dark.addEventListener("change", redraw);
  window.addEventListener("resize", redraw);
  redraw();
}

async function start() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old to unpack the trace; any of 2023 or later can");
  await open();
  $("moment").max = steps.length - 1;
  $("ticks").innerHTML = evictions.map((seen) => `<i style="left: ${100 * steps.indexOf(seen) / Math.max(1, steps.length - 1)}%"></i>`).join("");
  rankValues(); writeHead(); writeText(); writeHeads(); writeTable();
  state.token = Math.min(trace.prompt_length, pieces.length - 1);
  listen();
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => { $("trouble").hidden = false; $("trouble").textContent = `The trace cannot be shown: ${error.message}`; throw error; });
