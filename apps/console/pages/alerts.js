// Alerts: those that wait, and who acknowledged the others.
import { h, panel, table } from "./dom.js";
import { hazardCell, machineAddress } from "./fleet.js";
import { ago, life, percent, time } from "./format.js";

const NAME = "trimoe-console-name"; // kept in this browser

export const title = "Alerts";
export const every = 2;
export const address = () => "api/alerts";

export function render(data) {
  return [
    h("h1", { tabindex: -1 }, "Alerts"),
    h("p", { class: "search" },
      h("label", { for: "name" }, "Your name"),
      h("input", { id: "name", autocomplete: "name", maxlength: 64, value: localStorage.getItem(NAME) ?? "", "data-action": "name", "aria-describedby": "name-note" }),
      h("span", { id: "name-note", class: "small soft" }, "Kept with each alert you acknowledge, as you type it.")),
    open(data),
    acknowledged(data),
  ];
}

export const actions = {
  name: (element) => localStorage.setItem(NAME, element.value.trim()),
  async acknowledge(element, context) {
    const input = document.getElementById("name");
    if (!input.value.trim()) {
      input.focus();
      throw new Error("name: expected yours, so that others know who has seen the alert");
    }
    const { agent, seq, machine } = element.dataset;
    const rows = [...document.querySelectorAll("[data-action=acknowledge]")];
    const next = rows[rows.indexOf(element) + 1] ?? rows[rows.indexOf(element) - 1];
    await context.ask(`api/alerts/${encodeURIComponent(agent)}/${seq}/acknowledgement`, { name: input.value.trim() });
    await context.refresh();
    (next?.isConnected ? next : document.querySelector("h1")).focus();
    context.say(`Alert of ${machine} acknowledged.`);
  },
};

const link = (each) => h("a", { href: machineAddress(each.agent, each.machine) }, each.machine);
const hazard = (each) => [hazardCell(each.hazard, true), each.horizon_h ? h("span", { class: "soft wide" }, ` within ${each.horizon_h} h`) : null];

function open(data) {
  if (!data.open.length) return panel("Open", h("p", { class: "soft" }, "No alert waits."));
  const rows = data.open.map((each) => ({
    key: `${each.agent}/${each.seq}`,
    cells: [
      link(each),
      h("button", {
        type: "button", "data-action": "acknowledge", "data-agent": each.agent, "data-seq": each.seq, "data-machine": each.machine,
        "aria-label": `Acknowledge the alert of ${each.machine}, ${each.component}, hazard ${percent(each.hazard)}`,
      }, "Acknowledge"),
      each.component,
      hazard(each),
      life(each.life),
      [time(each.moment), h("span", { class: "soft" }, ` ${ago(data.now - each.moment)}`)],
      each.agent,
    ],
  }));
  return panel("Open", table("Newest first", [
    { name: "Machine" }, { name: h("span", { class: "hidden" }, "Action") }, { name: "Component" }, { name: "Hazard" },
    { name: "Remaining life (90 % interval)" }, { name: "Began" }, { name: "Box" },
  ], rows));
}

function acknowledged(data) {
  if (!data.acknowledged.length) return panel("Acknowledged", h("p", { class: "soft" }, "None yet."));
  const rows = data.acknowledged.map((each) => ({
    key: `${each.agent}/${each.seq}`,
    cells: [link(each), each.acknowledged_by, time(each.acknowledged_at), each.component, hazard(each), time(each.moment), each.agent],
  }));
  return panel("Acknowledged", table("Newest first", [
    { name: "Machine" }, { name: "By" }, { name: "At" }, { name: "Component" }, { name: "Hazard" }, { name: "Began" }, { name: "Box" },
  ], rows));
}
