// Drift: how far each box's newest forecasts are from its first ones.
import { h, panel, pill, table } from "./dom.js";
import { number } from "./format.js";

const LOOK = { steady: "good", shifting: "warn", drifted: "bad", waiting: "plain" };

export const title = "Drift";
export const every = 10;
export const address = () => "api/drift";

export function render(data) {
  return [
    h("h1", {}, "Drift"),
    h("p", { class: "lead" }, `The newest ${data.needed / 2} forecasts of the version a box runs against its first ${data.needed / 2}, as population stability index: `,
      `below ${data.steady} steady, above ${data.drifted} drifted. It shows that forecasts have moved, from the plant or from the model; it cannot say that they are wrong.`),
    data.boxes.length ? panel("Boxes", boxes(data)) : panel("Boxes", h("p", { class: "soft" }, "No box has reported yet.")),
  ];
}

function boxes(data) {
  const rows = data.boxes.map((box) => ({
    key: box.agent,
    cells: [
      box.agent,
      pill(LOOK[box.verdict], box.verdict),
      box.psi.hazard?.toFixed(3) ?? "-",
      box.psi.life?.toFixed(3) ?? "-",
      box.verdict === "waiting" ? `${number(box.num)} of ${number(data.needed)}` : number(box.num),
      box.version || "-",
      [box.group, box.is_offline ? [" ", pill("warn", "offline")] : null],
    ],
  }));
  return table("Largest first", [
    { name: "Box" }, { name: "Verdict" }, { name: "PSI of hazard", class: "n" }, { name: "PSI of remaining life", class: "n" },
    { name: "Forecasts", class: "n" }, { name: "Model" }, { name: "Group" }], rows);
}
