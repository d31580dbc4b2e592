// One loop for every page: ask, show, wait; a page says what it asks and how it looks.
import { patch } from "./dom.js";
import { clock, plural } from "./format.js";
import * as alerts from "./alerts.js";
import * as audit from "./audit.js";
import * as drift from "./drift.js";
import * as fleet from "./fleet.js";
import * as ledger from "./ledger.js";
import * as machine from "./machine.js";
import * as rollouts from "./rollouts.js";

const PAGES = { alerts, audit, drift, fleet, ledger, machine, rollouts };
const name = location.pathname.split("/").at(-1) || "fleet";
const page = PAGES[name];
const find = (id) => document.getElementById(id);
const PATIENCE_MS = 120_000; // the first answer after weeks reads all that came in since
let shown = null; // the last answer
let numAlerts = null;
let timer = 0;
let round = 0; // of asking; an answer to an older question is dropped

const context = {
  get params() {
    return new URLSearchParams(location.search);
  },
  get width() {
    return find("main").clientWidth;
  },
  // Seconds since 1970 by the platform's clock.
  get now() {
    return shown ? shown.data.now + (performance.now() - shown.at) / 1000 : Date.now() / 1000;
  },
  setParam(key, value) {
    const params = this.params;
    if (value) params.set(key, value);
    else params.delete(key);
    history.replaceState(null, "", `${location.pathname}${params.size ? `?${params}` : ""}`);
    return refresh();
  },
  fail(error) {
    find("error").textContent = error ? error.message : "";
    find("error").hidden = !error;
  },
  say(text) {
    find("state").textContent = text;
  },
  ask,
  refresh,
  draw,
};

async function ask(address, body) {
  const options = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
  let answer;
  try {
    answer = await fetch(address, { ...options, signal: AbortSignal.timeout(PATIENCE_MS) });
  } catch {
    throw new Error("platform: expected an answer, it cannot be reached");
  }
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.message ?? `platform: expected an answer, got HTTP ${answer.status}`);
  return found;
}

async function refresh() {
  clearTimeout(timer);
  round += 1;
  const mine = round;
  try {
    const data = await ask(page.address(context));
    if (mine !== round) return;
    shown = { data, at: performance.now() };
    if (find("error").dataset.from === "poll") context.fail(null);
    delete find("error").dataset.from;
    draw();
    count(data.num_open_alerts);
    find("state").dataset.state = "live";
    if (!find("state").textContent || find("state").textContent.startsWith("Figures")) context.say("Live.");
  } catch (error) {
    if (mine !== round) return;
    context.fail(error);
    find("error").dataset.from = "poll";
    if (shown) context.say(`Figures of ${clock(shown.data.now)}; asking again.`);
    else find("view").replaceChildren();
  }
  timer = setTimeout(refresh, document.hidden ? 30000 : page.every * 1000);
}

function draw() {
  if (!shown) return;
  const next = document.createElement("div");
  next.append(...[page.render(shown.data, context)].flat(Infinity).filter(Boolean));
  patch(find("view"), next);
  find("view").removeAttribute("aria-busy");
}

function count(num) {
  find("num-alerts").hidden = !num;
  find("num-alerts").textContent = num ? String(num) : "";
  find("num-alerts").setAttribute("aria-label", `${num} open`);
  if (numAlerts != null && num > numAlerts) context.say(`${plural(num - numAlerts, "new alert")}.`);
  numAlerts = num;
}

async function act(event) {
  const element = event.target.closest("[data-action]");
  if (!element || (event.type === "click") !== (element.tagName === "BUTTON")) return;
  const action = page.actions?.[element.dataset.action];
  if (!action) return;
  context.fail(null);
  try {
    await action(element, context, shown?.data);
  } catch (error) {
    context.fail(error);
  }
}

document.title = `${page.title} - trimoe console`;
document.querySelector(`[data-page="${name === "machine" ? "fleet" : name}"]`)?.setAttribute("aria-current", "page");
for (const kind of ["click", "input"]) document.addEventListener(kind, act);
document.addEventListener("visibilitychange", () => document.hidden || refresh());
new ResizeObserver(draw).observe(find("main"));
refresh();
