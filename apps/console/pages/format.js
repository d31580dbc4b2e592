// Numbers and times as people read them.
import { h } from "./dom.js";

const DAY_H = 24;

export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;

export function hours(value) {
  if (value >= 10 * DAY_H) return `${(value / DAY_H).toFixed(0)} d`;
  if (value >= 3 * DAY_H) return `${(value / DAY_H).toFixed(1)} d`;
  return `${value.toFixed(value < 10 ? 1 : 0)} h`;
}

export const life = ([low, median, high]) => [
  hours(median),
  h("span", { class: "soft" }, ` (${hours(low)} to ${hours(high)})`),
];

export function ago(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.floor(seconds))} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 48 * 3600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} d ago`;
}

export function time(moment, text = clock(moment)) {
  const date = new Date(moment * 1000);
  return h("time", { datetime: date.toISOString(), title: date.toString() }, text);
}

export const day = (moment) =>
  new Date(moment * 1000).toLocaleDateString("en-GB", { day: "numeric", month: "short", year: "numeric" });

export function clock(moment) {
  const date = new Date(moment * 1000);
  return `${day(moment)} ${date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" })}`;
}

export const number = (value) => value.toLocaleString("en-GB");
export const plural = (num, noun, many = `${noun}s`) => `${number(num)} ${num === 1 ? noun : many}`;
