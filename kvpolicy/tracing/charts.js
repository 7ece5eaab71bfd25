"use strict";
// Charts as SVG text: each function returns what goes into a figure. Nothing here knows a trace.

const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const short = (x) => (Math.abs(x) >= 100 || Number.isInteger(x) ? Math.round(x).toLocaleString("en") : Number(x.toPrecision(3)).toString());

/** Return a few round numbers from 0 to at least `most`. */
function ticks(most, count = 4) {
  const raw = most / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((x) => x * power >= raw);
  return Array.from({ length: Math.ceil(most / step - 1e-9) + 1 }, (_, i) => Number((i * step).toPrecision(12)));
}

/** Return the frame of a chart: places for numbers, and the SVG of its axes. */
function frame({ width, height, across, up, label, xs, ys, from = 0, to, low = 0, high, log = false, named = short }) {
  const left = 58, right = 14, top = 26, bottom = 42;
  const x = (v) => left + ((v - from) / (to - from || 1)) * (width - left - right);
  const t = log ? Math.log : (v) => v;
  const y = (v) => height - bottom - ((t(v) - t(low)) / (t(high) - t(low) || 1)) * (height - top - bottom);
  const axes = [
    ...ys.map((v) => `<line class="axis" x1="${left}" x2="${width - right}" y1="${y(v)}" y2="${y(v)}"/>` +
      `<text x="${left - 8}" y="${y(v) + 4}" text-anchor="end">${escaped(named(v))}</text>`),
    ...xs.map(([v, name]) => `<text x="${x(v)}" y="${height - bottom + 17}" text-anchor="middle">${escaped(name)}</text>`),
    `<text x="${(left + width - right) / 2}" y="${height - 6}" text-anchor="middle">${escaped(across)}</text>`,
    `<text x="${left - 50}" y="13">${escaped(up)}</text>`,
  ].join("");
  const svg = (inner) => `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${escaped(label)}">${axes}${inner}</svg>`;
  return { x, y, svg, top, left, width, height, floor: height - bottom };
}

/** Return a bar chart. `bars` are stacks of [name, parts]; `series` are [name, colour]. */
function barChart({ bars, series, most, every = 1, named, ...rest }) {
  const high = most ?? Math.max(1e-9, ...bars.map(([, parts]) => parts.reduce((a, b) => a + b, 0)));
  const ys = ticks(high);
  const xs = bars.map(([name], i) => [i + 0.5, name]).filter((_, i) => i % every === 0);
  const f = frame({ ...rest, xs, ys, to: bars.length, high: ys.at(-1), named });
  const gap = bars.length > 60 ? 0.04 : 0.14;
  const drawn = bars.map(([name, parts, told], i) => {
    let base = 0;
    const boxes = parts.map((part, s) => {
      const from = f.y(base), to = f.y(base += part);
      return `<rect x="${f.x(i + gap / 2)}" width="${Math.max(0.5, f.x(i + 1 - gap) - f.x(i))}" y="${to}" height="${Math.max(0, from - to)}" fill="${series[s][1]}"/>`;
    }).join("");
    return `<g>${boxes}<title>${escaped(told ?? `${name}: ${parts.map(short).join(", ")}`)}</title></g>`;
  }).join("");
  return f.svg(drawn + keyOf(f, series));
}

/** Return the names of some series, in the corner above a chart. */
function keyOf(f, series) {
  if (series.length < 2) return "";
  let right = f.width - 14;
  return [...series].reverse().map(([name, colour, mark]) => {
    const at = right - name.length * 6.4;
    right = at - 30;
    const shape = mark ? mark(at - 10, 9, colour) : `<rect x="${at - 15}" y="4" width="11" height="10" rx="2" fill="${colour}"/>`;
    return `${shape}<text x="${at}" y="13">${escaped(name)}</text>`;
  }).join("");
}

/** Return lines over `xs`. `series` are [name, colour, values]; `at` marks a moment. */
function lineChart({ xs, series, at, named, ...rest }) {
  const ys = ticks(Math.max(...series.flatMap(([, , values]) => Math.max(...values))));
  const to = Math.max(xs.at(-1), 1);
  const f = frame({ ...rest, xs: ticks(to, 6).filter((v) => v <= to).map((v) => [v, short(v)]), ys, to, high: ys.at(-1), named });
  const drawn = series.map(([, colour, values]) => {
    const path = values.map((v, i) => `${i ? "L" : "M"}${f.x(xs[i]).toFixed(1)} ${f.y(v).toFixed(1)}`).join("");
    return `<path d="${path}" fill="none" stroke="${colour}" stroke-width="2" stroke-linejoin="round"/>`;
  }).join("");
  const dots = series.map(([, colour, values]) => `<circle cx="${f.x(xs[at])}" cy="${f.y(values[at])}" r="4" fill="${colour}"/>`).join("");
  const now = `<line class="now" x1="${f.x(xs[at])}" x2="${f.x(xs[at])}" y1="${f.top}" y2="${f.floor}"/>`;
  return f.svg(drawn + now + dots + keyOf(f, series.map(([name, colour]) => [name, colour])));
}

const dot = (x, y, colour) => `<circle cx="${x}" cy="${y}" r="3" fill="${colour}"/>`;
const ring = (x, y, colour) => `<circle cx="${x}" cy="${y}" r="2.6" fill="none" stroke="${colour}"/>`;
const diamond = (x, y, colour) => `<path d="M${x} ${y - 5}l5 5l-5 5l-5 -5z" fill="${colour}"/>`;

/** Return marks at points, on a logarithmic scale. `points` are [x, y, index of a series, text]. */
function dotChart({ points, series, to, ...rest }) {
  const positive = points.map(([, v]) => v).filter((v) => v > 0);
  const low = positive.length ? Math.min(...positive) / 1.15 : 0.1, high = positive.length ? Math.max(...positive) * 1.15 : 1;
  const all = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) for (const m of [1, 2, 5]) all.push(m * 10 ** e);
  const ys = all.map((v) => Number(v.toPrecision(3))).filter((v) => v >= low && v <= high);
  const f = frame({ ...rest, xs: ticks(to, 6).filter((v) => v <= to).map((v) => [v, short(v)]), ys, to, low, high, log: true });
  const drawn = [...points].sort((a, b) => a[2] - b[2]).map(([x, v, s, told]) => {
    const [, colour, mark] = series[s];
    return `<g>${mark(f.x(x).toFixed(1) * 1, Number(f.y(Math.max(v, low)).toFixed(1)), colour)}<title>${escaped(told)}</title></g>`;
  }).join("");
  return f.svg(drawn + keyOf(f, series));
}
