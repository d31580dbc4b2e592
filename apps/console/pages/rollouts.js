// Rollouts: how far each is, and the operator's decisions over it.
import { bar } from "./chart.js";
import { facts, h, panel, pill, table } from "./dom.js";
import { ago, number, percent, plural, time } from "./format.js";
import { canonical, canSign, importKey, sign } from "./signing.js";

const ACTIONS = {
  running: ["pause", "stop"],
  paused: ["resume", "stop"],
  awaiting_approval: ["approve", "stop"],
};
const LOOK = { running: "info", paused: "warn", awaiting_approval: "warn", stopped: "bad", done: "good" };
const TELLS = {
  approve: "The next stage begins at once.",
  pause: "Boxes that have not begun are held back.",
  resume: "Boxes are given it again, as far as the stage allows.",
  stop: "No further box is given it; this is final.",
};
let holder = null; // {operator, key}, until the page is left

export const title = "Rollouts";
export const every = 2;
export const address = () => "api/rollouts";

export function render(data) {
  return [
    h("h1", { tabindex: -1 }, "Rollouts"),
    keyPanel(data),
    data.rollouts.length
      ? data.rollouts.map((each) => rolloutPanel(each, data))
      : panel("None yet", h("p", { class: "soft" }, "Begin one with ", h("code", {}, "trimoe sync rollout begin --fleet DIR BUNDLE --group NAME --history NPZ"), ".")),
  ];
}

export const actions = {
  async key(element, context, data) {
    const [file] = element.files;
    if (!file) return;
    const text = await file.text();
    element.value = "";
    holder = await importKey(text, data.operators);
    context.draw();
    context.say(`Key of ${holder.operator} is ready.`);
  },
  async decide(element, context, data) {
    const rollout = data.rollouts.find((each) => String(each.id) === element.dataset.rollout);
    await decide(rollout, element.dataset.verb, context);
    if (!element.isConnected) document.querySelector(`[data-rollout="${rollout.id}"]`)?.focus();
  },
};

function keyPanel(data) {
  if (!canSign()) {
    return panel("Operator key", h("p", {}, "A browser signs only on a secure page: open the console by https, or on the platform's own machine by localhost. The commands below decide in any case."));
  }
  const names = Object.keys(data.operators);
  return panel("Operator key",
    h("p", { class: "search" },
      h("label", { for: "key" }, "Key file (PEM)"),
      h("input", { id: "key", type: "file", accept: ".pem", "data-action": "key", "aria-describedby": "key-note" }),
      holder ? pill("good", `signs as ${holder.operator}`) : pill("plain", "no key")),
    h("p", { id: "key-note", class: "small soft" },
      "Decisions are signed in this browser. The key is not sent, cannot be read out by the page, and is forgotten when the page is left. ",
      names.length ? `Who may decide: ${names.join(", ")}.` : "Nobody may decide yet: trimoe sync rollout operator makes a key."));
}

function rolloutPanel(rollout, data) {
  const { tally } = rollout;
  const verbs = ACTIONS[rollout.status] ?? [];
  const given = tally.pending + tally.succeeded + tally.failed + tally.unreached;
  const parts = [["succeeded", "good"], ["failed", "bad"], ["unreached", "warn"], ["pending", "info"]];
  const text = parts.map(([name]) => `${tally[name]} ${name}`).join(", ");
  return h("article", { class: "panel", "data-key": `rollout-${rollout.id}`, "aria-labelledby": `rollout-${rollout.id}` },
    h("h2", { id: `rollout-${rollout.id}` }, `Rollout ${rollout.id}: version ${rollout.version} to group ${rollout.group} `, pill(LOOK[rollout.status], rollout.status.replaceAll("_", " "))),
    h("p", { class: "small soft" }, h("code", {}, rollout.path), " sha256 ", h("code", { title: rollout.digest }, rollout.digest.slice(0, 16))),
    rollout.reason ? h("p", {}, rollout.reason) : null,
    stages(rollout),
    h("p", { class: "progress" }, bar(`Boxes: ${text}, ${rollout.num_boxes - given} not given it`, [
      ...parts.map(([name, look]) => ({ num: tally[name], class: look })), { num: Math.max(0, rollout.num_boxes - given), class: "rest" }])),
    h("p", { class: "small" }, `${given} of ${plural(rollout.num_boxes, "box", "boxes")} were given it: ${text}.`),
    verbs.length ? decisions(rollout, verbs) : null,
    shadow(rollout),
    details(rollout, data.now));
}

function decisions(rollout, verbs) {
  if (!canSign()) {
    return h("p", { class: "small" }, "To decide: ", h("code", {}, `trimoe sync rollout ${verbs.join("|")} --fleet DIR ${rollout.id} --operator NAME --key FILE`));
  }
  return h("p", { class: "buttons" }, verbs.map((verb) => h("button", {
    type: "button", class: verb === "approve" || verb === "resume" ? "primary" : null,
    "data-key": verb, "data-action": "decide", "data-rollout": rollout.id, "data-verb": verb, "aria-label": `${name(verb)} rollout ${rollout.id}`,
  }, name(verb))));
}

function stages(rollout) {
  return h("ol", { class: "stages" }, rollout.stages.map((stage, idx) => {
    const isOver = rollout.status === "done" || idx < rollout.stage;
    const isHere = !isOver && idx === rollout.stage;
    return h("li", { class: isOver ? "over" : isHere ? "here" : "ahead", "aria-current": isHere ? "step" : null },
      h("b", {}, idx === 0 && rollout.stages.length > 1 ? "Canary" : `Stage ${idx + 1}`),
      ` ${percent(stage.share)}, ${plural(stage.num, "box", "boxes")}`,
      stage.needs_approval ? h("span", { class: "soft" }, ", then approval") : null,
      h("span", { class: "hidden" }, isOver ? ", done" : isHere ? ", here" : ", ahead"));
  }));
}

function shadow({ shadow: { new: fresh, old } }) {
  if (fresh.failed) return h("p", { class: "bad" }, `Shadow: ${fresh.failed}`);
  const column = (name, figures) => ({
    key: name,
    cells: [name, percent(figures.caught, 1), `${figures.lead_p50_h.toFixed(0)} h`, figures.false_per_month.toFixed(3), number(figures.num_failures)],
  });
  const rows = [column("This bundle", fresh), ...(old && !old.failed ? [column("In use before", old)] : [])];
  return table("Shadow on recorded windows", [
    { name: "Bundle" }, { name: "Failures caught", class: "n" }, { name: "Median lead", class: "n" },
    { name: "False alarms per machine-month", class: "n" }, { name: "Failures", class: "n" }], rows);
}

function details(rollout, now) {
  if (!rollout.assignments.length) return null;
  const rows = rollout.assignments.map((each) => ({
    key: each.agent,
    cells: [each.agent, each.state, String(each.stage + 1), each.detail.replaceAll("_", " ") || "-", time(each.since, ago(now - each.since))],
  }));
  return h("details", {}, h("summary", {}, "Boxes that were given it"), table("Those not done yet first", [
    { name: "Box" }, { name: "State" }, { name: "Stage", class: "n" }, { name: "Detail" }, { name: "Since" }], rows));
}

const name = (verb) => verb[0].toUpperCase() + verb.slice(1);

async function decide(rollout, verb, context) {
  if (!holder) {
    document.getElementById("key")?.focus();
    throw new Error(`key: expected an operator's, to ${verb} rollout ${rollout.id}; choose its file first`);
  }
  const { operator, key } = holder;
  const issued = Math.round(context.now * 1000) / 1000;
  const decision = { rollout: rollout.id, digest: rollout.digest, stage: rollout.stage, action: verb, operator, issued_at: issued };
  const text = canonical(decision);
  if (!(await confirm(`${name(verb)} rollout ${rollout.id}?`, `Version ${rollout.version} for group ${rollout.group}, as ${operator}. ${TELLS[verb]}`, text))) return;
  const signature = await sign(key, text);
  await context.ask(`../fleet/rollouts/${rollout.id}/decisions`, { ...decision, signature });
  await context.refresh();
  context.say(`Rollout ${rollout.id}: ${verb} was signed and done.`);
}

function confirm(title, tells, text) {
  const find = (id) => document.getElementById(id);
  const dialog = find("decision");
  find("decision-title").textContent = title;
  find("decision-text").textContent = tells;
  find("decision-bytes").textContent = text;
  return new Promise((resolve) => {
    const end = (isSigned) => {
      dialog.close();
      resolve(isSigned);
    };
    find("decision-cancel").onclick = () => end(false);
    find("decision-sign").onclick = () => end(true);
    dialog.oncancel = () => resolve(false); // Escape
    dialog.showModal();
  });
}
