// Drift: how far each box's newest forecasts are from its first ones.
import { h, panel, pill, table } from "./dom.js";
import { ago, number } from "./format.js";

const LOOK = { steady: "good", shifting: "warn", drifted: "bad", waiting: "plain" };

export const title = "Drift";
export const every = 10;
export const address = () => "api/drift";

export function render(data) {
  return [
    h("h1", {}, "Drift"),
    h("p", { class: "lead" }, `The newest ${data.needed / 2} forecasts of the version a box runs against its first ${data.needed / 2}, as population stability index: `,
      `below ${data.steady} steady, above ${data.drifted} drifted. It shows that forecasts have moved, from the plant or from the model; it cannot say that they are wrong. `,
      "The same index of the newest windows against the training of the model, of the name that has moved most, stands beside it."),
    data.triggers.length ? panel("Triggers", triggers(data)) : null,
    data.retrainings.length ? panel("Retrainings", retrainings(data)) : null,
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
      box.training ? [box.training.psi.toFixed(3), " ", h("small", {}, box.training.name)] : "-",
      box.verdict === "waiting" ? `${number(box.num)} of ${number(data.needed)}` : number(box.num),
      box.version || "-",
      [box.group, box.is_offline ? [" ", pill("warn", "offline")] : null],
    ],
  }));
  return table("Largest first", [
    { name: "Box" }, { name: "Verdict" }, { name: "PSI of hazard", class: "n" }, { name: "PSI of remaining life", class: "n" }, { name: "PSI against training", class: "n" },
    { name: "Forecasts", class: "n" }, { name: "Model" }, { name: "Group" }], rows);
}

function triggers(data) {
  const rows = data.triggers.map((each) => ({
    key: `${each.group} ${each.trigger}`,
    cells: [
      each.trigger,
      pill(each.is_active ? "bad" : "good", each.is_active ? "raised" : "clear"),
      each.value === null ? "-" : `${number(each.value)} ${each.unit}`,
      `${each.raise_at}, ${each.clear_at}`,
      each.detail,
      each.retraining ? `${each.retraining}` : "-",
      each.group,
    ],
  }));
  return table("What asks for a new training", [
    { name: "Trigger" }, { name: "State" }, { name: "Figure", class: "n" }, { name: "Raised at, cleared at", class: "n" },
    { name: "Of" }, { name: "Retraining", class: "n" }, { name: "Group" }], rows);
}

function retrainings(data) {
  const look = { rolled_out: "good", failed: "bad", refused: "bad" };
  const rows = data.retrainings.map((each) => ({
    key: `retraining ${each.number}`,
    cells: [
      `${each.number}`,
      pill(look[each.state] ?? "plain", each.state.replace("_", " ")),
      each.reasons.join(", "),
      ago(data.now - each.began_at),
      each.version || "-",
      each.detail,
      each.group,
    ],
  }));
  return table("Newest first", [
    { name: "Retraining" }, { name: "State" }, { name: "Because of" }, { name: "Began" },
    { name: "Version", class: "n" }, { name: "Detail" }, { name: "Group" }], rows);
}
