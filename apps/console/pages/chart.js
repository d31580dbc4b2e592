// Lines over time as inline SVG, drawn for the width at hand so that text keeps its size.
import { h, s } from "./dom.js";

const HOUR = 3600;
const STEPS = [0.25, 0.5, 1, 2, 3, 6, 12, 24, 48, 96, 168, 336, 720, 2160].map((each) => each * HOUR);
const EDGE = { left: 46, right: 14, top: 10, bottom: 24 };
const GAP = 4; // steps between neighbours beyond which nothing was measured: the line breaks

// lines: [{name, class, points: [[t, v or null]]}], band: {name, points: [[t, low, high]]},
// levels: [{value, name}], marks: [{t, title}], top: highest value or none, format: of values.
export function chart({ label, from, until, width, height = 190, lines, band, levels = [], marks = [], top, format }) {
  const span = Math.max(until - from, HOUR);
  const values = [
    ...lines.flatMap((line) => line.points.map(([, value]) => value)),
    ...(band ? band.points.flatMap(([, low, high]) => [low, high]) : []),
  ].filter((value) => value != null);
  const [low, high] = top ? [0, top] : bounds(values);
  const x = (t) => EDGE.left + ((t - (until - span)) / span) * (width - EDGE.left - EDGE.right);
  const y = (value) => height - EDGE.bottom - ((value - low) / (high - low)) * (height - EDGE.top - EDGE.bottom);
  const right = width - EDGE.right;
  return h(
    "figure",
    { class: "chart" },
    s(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label },
      ticks(low, high, height < 120 ? 2 : 4).map((value) => [
        s("line", { class: "grid", x1: EDGE.left, x2: right, y1: y(value), y2: y(value) }),
        s("text", { class: "tick end", x: EDGE.left - 6, y: y(value) + 4 }, format(value)),
      ]),
      times(until - span, until, width).map(([t, text]) => [
        s("line", { class: "grid", x1: x(t), x2: x(t), y1: height - EDGE.bottom, y2: height - EDGE.bottom + 4 }),
        s("text", { class: "tick middle", x: x(t), y: height - 7 }, text),
      ]),
      band ? s("path", { class: "band", d: area(band.points, x, y) }) : null,
      levels.map((each) => s("line", { class: "level", x1: EDGE.left, x2: right, y1: y(each.value), y2: y(each.value) })),
      lines.map((line) => s("path", { class: `line ${line.class}`, d: path(line.points, x, y) })),
      lines.flatMap((line) => alone(line.points).map(([t, value]) => s("circle", { class: `dot ${line.class}`, cx: x(t), cy: y(value), r: 2.5 }))),
      marks.map((mark) =>
        s("path", { class: "mark", d: `M${x(mark.t)} ${height - EDGE.bottom}v${EDGE.top + EDGE.bottom - height}` }, s("title", {}, mark.title)),
      ),
    ),
    h(
      "ul",
      { class: "keys" },
      lines.map((line) => key(s("line", { class: `line ${line.class}`, x1: 1, x2: 21, y1: 6, y2: 6 }), line.name)),
      band ? key(s("rect", { class: "band", x: 1, y: 1, width: 20, height: 10 }), band.name) : null,
      levels.map((each) => key(s("line", { class: "level", x1: 1, x2: 21, y1: 6, y2: 6 }), each.name)),
      marks.length ? key(s("path", { class: "mark", d: "M11 0v12" }), "alert") : null,
    ),
  );
}

// Shares of a whole as one bar.
export function bar(label, parts) {
  const all = parts.reduce((sum, part) => sum + part.num, 0) || 1;
  let before = 0;
  const pieces = parts.map((part) => {
    const piece = s("rect", { class: part.class, x: (100 * before) / all, width: (100 * part.num) / all, y: 0, height: 10 });
    before += part.num;
    return piece;
  });
  return s("svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": label },
    s("rect", { class: "rest", width: 100, height: 10 }), pieces);
}

function key(swatch, name) {
  return h("li", {}, s("svg", { class: "swatch", width: 22, height: 12, "aria-hidden": "true" }, swatch), name);
}

function bounds(values) {
  if (!values.length) return [0, 1];
  const low = Math.min(...values);
  const high = Math.max(...values);
  const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low < high * 0.5 ? 0 : low - room, high + room];
}

function ticks(low, high, num) {
  const rough = (high - low) / num;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.999);
  const found = [];
  for (let idx = Math.ceil(low / step - 1e-9); idx * step <= high + step * 1e-9; idx += 1) found.push(idx * step);
  return found;
}

// Round local times, as many as there is room for.
function times(from, until, width) {
  const num = Math.max(2, Math.floor(width / 85));
  const step = STEPS.find((each) => (until - from) / each <= num) ?? STEPS.at(-1);
  const zone = -new Date(until * 1000).getTimezoneOffset() * 60;
  const found = [];
  for (let t = Math.ceil((from + zone) / step) * step - zone; t <= until; t += step) {
    const date = new Date(t * 1000);
    const text = step >= 24 * HOUR || (date.getHours() === 0 && date.getMinutes() === 0)
      ? date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })
      : date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
    found.push([t, text]);
  }
  return found;
}

// Runs without a gap or a missing value.
function runs(points) {
  const steps = points.slice(1).map(([t], idx) => t - points[idx][0]).sort((a, b) => a - b);
  const widest = GAP * (steps[Math.floor(steps.length / 2)] ?? Infinity);
  const found = [[]];
  points.forEach((point, idx) => {
    if (idx && point[0] - points[idx - 1][0] > widest) found.push([]);
    if (point[1] == null) found.push([]);
    else found.at(-1).push(point);
  });
  return found.filter((run) => run.length);
}

const alone = (points) => runs(points).filter((run) => run.length === 1).flat();

function path(points, x, y) {
  return runs(points)
    .map((run) => run.map(([t, value], idx) => `${idx ? "L" : "M"}${round(x(t))} ${round(y(value))}`).join(""))
    .join("");
}

function area(points, x, y) {
  return runs(points)
    .map((run) => {
      const upper = run.map(([t, , high]) => `${round(x(t))} ${round(y(high))}`);
      const lower = run.map(([t, low]) => `${round(x(t))} ${round(y(low))}`).reverse();
      return `M${[...upper, ...lower].join("L")}Z`;
    })
    .join("");
}

const round = (value) => Math.round(value * 10) / 10;
