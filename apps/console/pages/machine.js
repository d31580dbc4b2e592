// One machine: what fails when, over time, with its sensors and what happened around it.
import { chart } from "./chart.js";
import { facts, h, panel, pill, table } from "./dom.js";
import { hazardCell } from "./fleet.js";
import { ago, hours, life, percent, time } from "./format.js";

const SPANS = [[24, "1 day"], [168, "7 days"], [720, "30 days"], [8760, "1 year"]];

export const title = "Machine";
export const every = 3;
export const address = ({ params }) =>
  `api/machine?${new URLSearchParams({ agent: params.get("agent") ?? "", machine: params.get("machine") ?? "", hours: params.get("hours") ?? "168" })}`;

export function render(data, context) {
  const { latest, box, now } = data;
  const chosen = context.params.get("hours") ?? "168";
  return [
    h("p", { class: "kicker" }, h("a", { href: "./" }, "Fleet")),
    h("h1", {}, latest.machine, " ", latest.is_alert ? pill("bad", "alert") : null),
    facts([
      ["Remaining life", hours(latest.life[1]), `90 %: ${hours(latest.life[0])} to ${hours(latest.life[2])}`],
      [latest.peak_horizon_h ? `Hazard within ${latest.peak_horizon_h} h` : "Hazard", percent(latest.peak), latest.component],
      ["Forecast", ago(now - latest.moment)],
      ["Box", latest.agent, box?.is_offline ? "offline" : "online"],
      ["Model", latest.version, box ? `slot ${box.slot || "-"}` : ""],
    ]),
    box?.is_offline ? h("p", { class: "note" }, `The box was last seen ${ago(now - box.last_seen)}; it goes on forecasting by itself and uploads when it is back.`) : null,
    h("p", { class: "search" },
      h("label", { for: "hours" }, "Show the last"),
      h("select", { id: "hours", "data-action": "hours" },
        SPANS.map(([value, name]) => h("option", { value, selected: String(value) === chosen }, name)))),
    lifePanel(data, context),
    latest.components.map((component) => hazardPanel(component, data, context)),
    latestPanel(latest),
    sensors(data, context),
    alerts(data),
    events(data),
  ];
}

export const actions = {
  hours: (element, context) => context.setParam("hours", element.value),
};

const inner = (context) => Math.max(260, context.width - (context.width < 560 ? 30 : 38));

function frame(data, context) {
  const marks = data.alerts.map((each) => ({ t: each.moment, title: `alert: ${each.component}`, component: each.component }));
  return { from: data.since, until: data.until, width: inner(context), marks };
}

function lifePanel(data, context) {
  const { latest } = data;
  const inDays = data.forecasts.some((each) => each.life[2] > 96);
  const unit = inDays ? 24 : 1; // hours
  return panel("Remaining useful life", chart({
    ...frame(data, context),
    marks: [],
    label: `Remaining useful life over time; now ${hours(latest.life[1])}, 90 % interval ${hours(latest.life[0])} to ${hours(latest.life[2])}`,
    lines: [{ name: "median", class: "strong", points: data.forecasts.map((each) => [each.moment, each.life[1] / unit]) }],
    band: { name: "90 % interval", points: data.forecasts.map((each) => [each.moment, each.life[0] / unit, each.life[2] / unit]) },
    format: (value) => `${round(value)} ${inDays ? "d" : "h"}`,
  }));
}

function hazardPanel(component, data, context) {
  const { latest } = data;
  const given = frame(data, context);
  const index = latest.components.indexOf(component);
  const lines = latest.horizons_h.map((horizon, place) => ({
    name: horizon ? `within ${horizon} h` : `horizon ${place + 1}`,
    class: horizon && horizon === latest.alert_horizon_h ? "strong" : `h${place}`,
    points: data.forecasts.map((each) => [each.moment, each.hazard[component]?.[place] ?? null]),
  }));
  return panel(`Hazard of ${component}`, chart({
    ...given,
    marks: given.marks.filter((mark) => mark.component === component),
    label: `Hazard of ${component} over time; now ${percent(latest.hazard[index].at(-1))} at the longest horizon`,
    lines,
    levels: latest.threshold == null ? [] : [{ value: latest.threshold, name: `alert from ${percent(latest.threshold)} within ${latest.alert_horizon_h} h` }],
    top: 1,
    format: percent,
  }));
}

function latestPanel(latest) {
  const heads = [{ name: "Component" }, ...latest.horizons_h.map((horizon, place) => ({ name: horizon ? `Within ${horizon} h` : `Horizon ${place + 1}` }))];
  const rows = latest.components.map((component, idx) => ({
    key: component,
    cells: [component, ...latest.hazard[idx].map((value, place) =>
      hazardCell(value, latest.threshold != null && latest.horizons_h[place] === latest.alert_horizon_h && value >= latest.threshold))],
  }));
  return panel("Latest forecast", table("Probability of a failure, by component and horizon", heads, rows));
}

function sensors(data, context) {
  const names = Object.entries(data.sensors);
  if (!names.length) {
    return panel("Sensors", h("p", { class: "soft" }, "This box uploads forecasts and no sensor values in this time."));
  }
  const narrow = context.width < 700;
  const width = narrow ? inner(context) : Math.floor((inner(context) - 20) / 2);
  return panel("Sensors", h("div", { class: "sensors" }, names.map(([name, points]) => {
    const last = points.findLast(([, value]) => value != null);
    return h("div", {}, h("h3", {}, name, last ? h("span", { class: "soft" }, ` ${round(last[1])}`) : null), chart({
      ...frame(data, context), width, height: 110, marks: [], format: round,
      label: `${name} over time${last ? `; last ${round(last[1])}` : ""}`,
      lines: [{ name, class: "strong", points }],
    }));
  })));
}

function alerts(data) {
  if (!data.alerts.length) return panel("Alerts", h("p", { class: "soft" }, "None in this time."));
  const rows = data.alerts.toReversed().map((each) => ({
    key: String(each.seq),
    cells: [time(each.moment), each.component, hazardCell(each.hazard, true), life(each.life),
      each.acknowledged_by ? ["by ", each.acknowledged_by, " ", time(each.acknowledged_at)] : h("a", { href: "alerts" }, "open")],
  }));
  return panel("Alerts", table("Newest first", [{ name: "Time" }, { name: "Component" }, { name: "Hazard" }, { name: "Remaining life (90 % interval)" }, { name: "Acknowledged" }], rows));
}

function events(data) {
  const name = data.latest.agent;
  if (!data.events.length) return panel(`Events of box ${name}`, h("p", { class: "soft" }, "None came in yet."));
  const rows = data.events.map((each) => ({ cells: [time(each.moment), each.event.replaceAll("_", " "), each.detail] }));
  return panel(`Events of box ${name}`, table("By the clock of the box, newest first", [{ name: "Time" }, { name: "Event" }, { name: "Detail", class: "detail" }], rows));
}

const round = (value) => Number(value.toPrecision(4)).toLocaleString("en-GB", { maximumFractionDigits: 6 });
