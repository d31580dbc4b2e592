// The audit log: its end, and whether its chain holds.
import { h, panel, pill, table } from "./dom.js";
import { plural, time } from "./format.js";

export const title = "Audit log";
export const every = 10;
export const address = () => "api/audit";

export function render(data) {
  return [
    h("h1", {}, "Audit log ", data.broken ? pill("bad", "chain broken") : pill("good", "chain holds")),
    data.broken
      ? h("p", { class: "bad" }, data.broken)
      : h("p", { class: "lead" }, "Every entry follows from the one before. A copy of the end of the chain, kept elsewhere, proves later that nothing was cut off: ", h("code", {}, data.end)),
    data.entries.length ? panel("Entries", entries(data)) : panel("Entries", h("p", { class: "soft" }, "Nothing was decided yet.")),
  ];
}

function entries(data) {
  const rows = data.entries.map((each) => ({
    key: String(each.seq),
    cells: [String(each.seq), time(each.time), each.actor, each.action.replaceAll("_", " "), h("span", { title: each.detail }, detail(each)), h("code", { title: each.hash }, each.hash.slice(0, 12))],
  }));
  return table(`The newest ${plural(data.entries.length, "entry", "entries")}, newest first`, [
    { name: "No." }, { name: "Time" }, { name: "Who" }, { name: "What" }, { name: "On what, and why", class: "detail" }, { name: "Hash" }], rows);
}

// "rollout 3, stage 1: why" of the JSON in the log, stages counted from 1 as on the other pages.
function detail({ detail: text, action }) {
  const { rollout, stage, reason, status, ...others } = JSON.parse(text);
  const parts = [
    rollout == null ? null : `rollout ${rollout}`,
    stage == null ? null : `stage ${stage + 1}`,
    ...Object.entries(others).filter(([, value]) => value !== "").map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`),
    status && status !== action ? status.replaceAll("_", " ") : null,
  ].filter(Boolean);
  return parts.join(", ") + (reason ? `: ${reason}` : "");
}
