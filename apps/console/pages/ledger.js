// The downtime ledger: planned against unplanned hours, under a stated cost model.
import { facts, h, panel, table } from "./dom.js";
import { day, percent, time } from "./format.js";

export const title = "Ledger";
export const every = 30;
export const address = () => "api/ledger";

export function render({ ledger }) {
  if (!ledger) {
    return [
      h("h1", {}, "Downtime ledger"),
      panel("Not made yet", h("p", {}, "The ledger replays a recorded period: which failures would have been planned stops, and what that saves."),
        h("p", {}, "Make it with ", h("code", {}, "trimoe maintenance ledger --json <fleet>/ledger.json"), "; it appears here.")),
    ];
  }
  const { policy, baseline, interval: [low, high] } = ledger;
  const row = (name, of) => ({ key: name, cells: [name, hoursOf(of.unplanned_hours), hoursOf(of.planned_hours), hoursOf(of.unplanned_hours + of.planned_hours)] });
  return [
    h("h1", {}, "Downtime ledger"),
    facts([
      ["Unplanned hours spared", percent(ledger.share), `${percent(ledger.level)} interval: ${percent(low)} to ${percent(high)}`],
      ["Unplanned", hoursOf(policy.unplanned_hours), `instead of ${hoursOf(baseline.unplanned_hours)}`],
      ["Planned", hoursOf(policy.planned_hours), `instead of ${hoursOf(baseline.planned_hours)}`],
    ]),
    panel("Hours", table("Downtime of the fleet in the period", [
      { name: "Policy" }, { name: "Unplanned", class: "n" }, { name: "Planned", class: "n" }, { name: "Together", class: "n" }],
      [row("With forecasts", policy), row(baseline.name, baseline)]),
      h("p", { class: "small soft" }, "From ", time(ledger.from, day(ledger.from)), " to ", time(ledger.to, day(ledger.to)), ".")),
    panel("Cost model", table("What the hours are counted by", [{ name: "Term" }, { name: "Value", class: "n" }],
      Object.entries(ledger.cost_model).map(([name, value]) => ({ key: name, cells: [name.replaceAll("_", " "), value] })))),
  ];
}

const hoursOf = (value) => `${value.toLocaleString("en-GB", { maximumFractionDigits: 1 })} h`;
