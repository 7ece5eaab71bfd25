"use strict";
// What is drawn of a trace: the map and the grid on canvases, and the charts. Nothing here changes the state.

// ---------------------------------------------------------------- colours and canvases

const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const mixed = (a, b, share) => a.map((x, i) => x + (b[i] - x) * share);
let paint = {};

function readColours() {
  for (const name of ["paper", "card", "none", "full", "deep", "guard", "other", "gone", "ink", "muted", "line"]) paint[name] = colourOf(`--${name}`);
  paint.rgb = Object.fromEntries(Object.entries(paint).filter(([, v]) => typeof v === "string").map(([name, hex]) => [name, rgb(hex)]));
}

/** Return the colour of one token in one head. */
function cellColour(at, p, seen, e) {
  const c = paint.rgb;
  if (p >= seen) return c.paper;
  if (state.colour === "life") return mixed(c.none, c.deep, Math.sqrt(lifetime(at, p) / data.most));
  if (state.colour === "value") return mixed(c.none, c.guard, data.levels[at] / 255);
  if (!isHeld(at, p, seen)) return c.gone;
  return isSafe(at, e) ? c.guard : c.deep;
}

/** Rank the values of each head: what is large differs between heads. */
function rankValues() {
  data.levels = new Uint8Array(data.values.length);
  for (let h = 0; h < heads.length; h++) {
    const line = data.values.subarray(h * data.size, (h + 1) * data.size), sorted = Float32Array.from(line).sort();
    const low = Math.log(Math.max(sorted[0], 1e-9)), span = Math.log(Math.max(sorted.at(-1), 1e-9)) - low || 1;
    for (let p = 0; p < data.size; p++) data.levels[h * data.size + p] = 255 * (Math.log(Math.max(line[p], 1e-9)) - low) / span;
  }
}

const margin = { left: 58, bottom: 34 };

let drawn = { key: "", canvas: null };

/** Return a canvas with a pixel for each token and head; it is painted when the moment, the theme or the choice changes. */
function cells(seen, e) {
  const key = [seen, state.colour, paint.paper].join();
  if (drawn.key === key) return drawn.canvas;
  const image = new ImageData(data.size, heads.length), small = document.createElement("canvas");
  for (let h = 0, at = 0; h < heads.length; h++) for (let p = 0; p < data.size; p++, at++) {
    const [r, g, b] = cellColour(at, p, seen, e);
    image.data.set([r, g, b, 255], at * 4);
  }
  small.width = data.size; small.height = heads.length;
  small.getContext("2d").putImageData(image, 0, 0);
  drawn = { key, canvas: small };
  return small;
}

function drawMap() {
  const canvas = $("map"), scale = window.devicePixelRatio || 1, width = canvas.parentElement.clientWidth;
  const line = Math.max(2, Math.min(8, Math.round(420 / heads.length)));
  const height = line * heads.length, plot = width - margin.left;
  canvas.width = width * scale; canvas.height = (height + margin.bottom) * scale;
  canvas.style.height = `${height + margin.bottom}px`;
  const context = canvas.getContext("2d"), seen = seenNow(), small = cells(seen, evictionNow());
  context.scale(scale, scale);
  context.imageSmoothingEnabled = plot * scale < data.size;
  context.drawImage(small, margin.left, 0, plot, height);
  context.font = "12px system-ui, sans-serif";
  context.fillStyle = paint.muted;
  const x = (p) => margin.left + (p / data.size) * plot;
  context.textAlign = "right";
  let previous = -99;
  heads.forEach(([layer, head], h) => {
    if (head === 0 && (h - previous) * line >= 26) { context.fillText(`layer ${layer}`, margin.left - 6, h * line + 10); previous = h; }
  });
  context.textAlign = "center";
  for (const p of ticks(data.size, 8)) if (p < data.size) context.fillText(short(p), x(p), height + 15);
  context.fillText("position", margin.left + plot / 2, height + 30);
  context.strokeStyle = paint.ink;
  if (seen < data.size) { context.setLineDash([3, 3]); context.strokeRect(x(seen), -1, 0, height + 1); context.setLineDash([]); }
  if (state.token >= 0 && state.token < data.size) context.strokeRect(x(state.token) - 0.5, 0.5, plot / data.size + 1, height - 1);
  if (state.cell) context.strokeRect(x(state.cell[1]) - 2, state.cell[0] * line - 2, plot / data.size + 4, line + 4);
  canvas.dataset.line = line;
  canvas.setAttribute("aria-label", `Heat map of ${heads.length} heads and ${data.size} tokens after ${seen} tokens; arrow keys move over it`);
}

function tellCell() {
  if (!state.cell) { $("cell").textContent = ""; return; }
  const [h, p] = state.cell, at = h * data.size + p, e = data.dropped[at], seen = seenNow();
  const now = p >= seen ? "not seen yet" : isHeld(at, p, seen) ? "held now" : "dropped";
  const fate = e ? `dropped at eviction ${e}, after ${lifetime(at, p)} tokens` : "held to the end";
  const safe = data.first[at] ? `; protected at evictions ${data.first[at]} to ${data.last[at]}` : "";
  $("cell").textContent = `“${visible(pieces[p])}”, position ${p}, ${called(heads[h])}: ${now}; ${fate}${safe}; value ${short(data.values[at])}`;
}

function pointAtMap(event) {
  const box = $("map").getBoundingClientRect(), line = Number($("map").dataset.line);
  const p = Math.floor((event.clientX - box.left - margin.left) / (box.width - margin.left) * data.size);
  const h = Math.floor((event.clientY - box.top) / line);
  if (p < 0 || p >= data.size || h < 0 || h >= heads.length) return;
  state.cell = [h, p];
  tellCell();
  choose(p);
}

function moveOnMap(event) {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!step) return;
  event.preventDefault();
  const [h, p] = state.cell ?? [0, Math.max(state.token, 0)];
  state.cell = [Math.max(0, Math.min(heads.length - 1, h + step[0])), Math.max(0, Math.min(data.size - 1, p + step[1]))];
  tellCell();
  choose(state.cell[1]);
}

function drawGrid(p) {
  const canvas = $("grid"), layers = [...new Set(heads.map(([layer]) => layer))], most = Math.max(...heads.map(([, head]) => head)) + 1;
  if (p >= data.size) { canvas.hidden = true; $("gridkey").textContent = ""; return; }
  canvas.hidden = false;
  const scale = window.devicePixelRatio || 1, width = canvas.parentElement.clientWidth - 36, cell = width / layers.length, tall = Math.min(16, Math.max(5, cell));
  canvas.width = width * scale; canvas.height = tall * most * scale; canvas.style.height = `${tall * most}px`;
  const context = canvas.getContext("2d"), seen = seenNow(), e = evictionNow(), colour = state.colour;
  context.scale(scale, scale);
  state.colour = "held";
  heads.forEach(([layer, head], h) => {
    const at = h * data.size + p;
    context.fillStyle = p >= seen ? paint.card : `rgb(${cellColour(at, p, seen, e).join(" ")})`;
    context.fillRect(layers.indexOf(layer) * cell, head * tall, cell - 1, tall - 1);
  });
  state.colour = colour;
  canvas.setAttribute("aria-label", `Which heads hold token ${p}: ${columns.held[p]} of ${heads.length}`);
  $("gridkey").textContent = `Layers ${layers[0]} to ${layers.at(-1)} from left to right, heads downwards`;
}

// ---------------------------------------------------------------- charts

function drawWhere() {
  const wide = Math.max(1, Math.ceil(data.size / 48)), bars = [];
  for (let p = 0; p < data.size; p += wide) {
    const mine = columns.held.slice(p, p + wide), share = mine.reduce((a, b) => a + b, 0) / (mine.length * heads.length);
    bars.push([String(p), [100 * share], `positions ${p} to ${p + mine.length - 1}: ${short(100 * share)} % held`]);
  }
  $("where").innerHTML = barChart({ bars, series: [["held", paint.deep]], most: 100, every: Math.ceil(bars.length / 6), width: $("where").clientWidth, height: 240,
    across: "position", up: "held, % of heads", label: `Share of heads that hold each stretch of the text after ${seenNow()} tokens`, named: (v) => `${v}` });
}

function drawLives() {
  const bins = Array.from({ length: Math.ceil(Math.log2(data.most + 1)) }, (_, i) => [`${2 ** i}${i ? `–${2 ** (i + 1) - 1}` : ""}`, [0, 0]]);
  for (let h = 0, at = 0; h < heads.length; h++) for (let p = 0; p < data.size; p++, at++) {
    bins[Math.floor(Math.log2(lifetime(at, p)))][1][data.dropped[at] ? 0 : 1]++;
  }
  const told = bins.map(([name, [gone, here]]) => [name.split("–")[0], [gone, here], `${name} tokens: ${short(gone)} dropped, ${short(here)} held at the end`]);
  $("life").innerHTML = barChart({ bars: told, series: [["dropped", paint.muted], ["held at the end", paint.deep]], width: $("life").clientWidth, height: 240,
    across: "lifetime in tokens, each bar up to the next", up: "tokens × heads", label: "Histogram of lifetimes" });
}

function drawValues() {
  const h = state.head, seen = seenNow(), e = evictionNow(), points = [];
  const series = [["dropped", paint.muted, ring], ["held", paint.deep, dot], ["protected", paint.guard, diamond]];
  for (let p = 0; p < Math.min(seen, data.size); p++) {
    const at = h * data.size + p, kind = !isHeld(at, p, seen) ? 0 : isSafe(at, e) ? 2 : 1;
    points.push([p, data.values[at], kind, `“${visible(pieces[p])}”, position ${p}: ${short(data.values[at])}, ${series[kind][0]}`]);
  }
  $("values").innerHTML = dotChart({ points, series, to: data.size, width: $("values").clientWidth, height: 300, across: "position", up: `${trace.norm} of the value`,
    label: `Size of the value of each token in ${called(heads[h])}; ${points.filter(([, , kind]) => kind === 2).length} are protected` });
}

function drawMemory() {
  const series = [["full cache", paint.muted, trace.full_nbytes], ["allocated", paint.deep, trace.nbytes], ["in use", paint.other, trace.used_nbytes]];
  $("memory").innerHTML = lineChart({ xs: steps, series, at: state.now, width: $("memory").clientWidth, height: 280, across: "tokens seen", up: "bytes", named: bytes,
    label: `Memory after ${seenNow()} tokens: ${bytes(trace.nbytes[state.now])} allocated, ${bytes(trace.full_nbytes[state.now])} with the full cache` });
}

function writeHeads() {
  let best = 0;
  heads.forEach((one, h) => {
    $("head").append(new Option(called(one), h));
    const line = Float32Array.from(data.values.subarray(h * data.size, (h + 1) * data.size)).sort();
    const ratio = line.at(-1) / (line[line.length >> 1] || 1);
    if (ratio > best) { best = ratio; state.head = h; }
  });
  $("head").value = state.head;
  $("norm").textContent = `The ${trace.norm} of a token's value state, on a logarithmic scale, and what guards protect at the moment above. ` +
    `Shown first: ${called(heads[state.head])}, whose largest value is ${short(best)} times its median.`;
}
