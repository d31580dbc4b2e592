// The fleet: which machine needs attention, and how each box is.
import { facts, h, panel, pill, table } from "./dom.js";
import { ago, life, number, percent, plural, time } from "./format.js";

export const title = "Fleet";
export const every = 2;
export const address = ({ params }) => `api/fleet?find=${encodeURIComponent(params.get("find") ?? "")}`;

export function render(data, context) {
  const { now } = data;
  return [
    h("h1", {}, "Fleet"),
    facts([
      ["Machines", number(data.num_machines)],
      ["Boxes", number(data.num_boxes), data.num_offline ? `${data.num_offline} offline` : "all online"],
      ["Open alerts", number(data.num_open_alerts)],
      ["Messages waiting on boxes", number(data.num_waiting), "as last reported"],
    ]),
    h("p", { class: "search" },
      h("label", { for: "find" }, "Find machine, box or group"),
      h("input", { id: "find", type: "search", autocomplete: "off", "data-action": "find", value: context.params.get("find") ?? "" })),
    machines(data, now),
    boxes(data, now),
  ];
}

export const actions = {
  find: (element, context) => context.setParam("find", element.value.trim()),
};

export const machineAddress = (agent, machine) =>
  `machine?agent=${encodeURIComponent(agent)}&machine=${encodeURIComponent(machine)}`;

export function hazardCell(value, isAlert) {
  return h("span", { class: "hazard" },
    h("meter", { min: 0, max: 1, value: value.toFixed(4), "aria-hidden": "true", class: isAlert ? "bad" : null }),
    h("span", { class: isAlert ? "bad" : null }, percent(value)));
}

function machines(data, now) {
  if (!data.machines.length) {
    const text = data.num_machines
      ? "No machine is found by this."
      : "No forecast has come in yet. A box forecasts once a model serves there and windows reach it.";
    return panel("Machines", h("p", { class: "soft" }, text));
  }
  const horizon = data.machines[0].peak_horizon_h;
  const rows = data.machines.map((each) => ({
    key: `${each.agent}/${each.machine}`,
    cells: [
      h("a", { href: machineAddress(each.agent, each.machine) }, each.machine),
      [hazardCell(each.peak, each.is_alert), each.is_alert ? [" ", pill("bad", "alert")] : null],
      each.component,
      life(each.life),
      [each.agent, each.is_offline ? [" ", pill("warn", "offline")] : null],
      time(each.moment, ago(now - each.moment)),
    ],
  }));
  const shown = data.machines.length < data.num_machines_found ? `, ${data.machines.length} of ${number(data.num_machines_found)}` : "";
  return panel("Machines", table(`Highest hazard first${shown}`, [
    { name: "Machine" }, { name: horizon ? `Hazard, ${horizon} h` : "Hazard" }, { name: "Component" },
    { name: "Remaining life (90 % interval)" }, { name: "Box" }, { name: "Forecast", class: "n" },
  ], rows));
}

function boxes(data, now) {
  if (!data.num_boxes) {
    return panel("Boxes", h("p", { class: "soft" }, "No box has reported yet. Set one up with ", h("code", {}, "trimoe edge init"), "."));
  }
  const rows = data.boxes.map((box) => ({
    key: box.agent,
    cells: [
      box.agent,
      box.is_offline ? pill("warn", "offline") : pill("good", "online"),
      time(box.last_seen, ago(now - box.last_seen)),
      [number(box.waiting), box.num_evicted ? h("span", { class: "bad" }, `, ${number(box.num_evicted)} given up`) : null],
      box.version ? [`${box.version} `, box.confirmed ? null : pill("warn", "watched")] : pill("bad", "none"),
      box.slot || "-",
      box.group,
      [box.outcome ? box.outcome.replaceAll("_", " ") : "-", box.num_malformed ? h("span", { class: "bad" }, `, ${plural(box.num_malformed, "unreadable message")}`) : null],
    ],
  }));
  const shown = data.boxes.length < data.num_boxes_found ? `, ${data.boxes.length} of ${number(data.num_boxes_found)}` : "";
  return panel("Boxes", table(`Offline ones first${shown}; queue and model as last reported`, [
    { name: "Box" }, { name: "State" }, { name: "Last seen" }, { name: "Queue", class: "n" },
    { name: "Version", class: "n" }, { name: "Slot" }, { name: "Group" }, { name: "Last update" },
  ], rows));
}
