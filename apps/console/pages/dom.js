// Elements from data, and a page that is brought up to date without losing focus or scroll.
// Text becomes text nodes only: nothing a machine or a box is called can become markup.

const SVG = "http://www.w3.org/2000/svg";
const OWN = new Set(["open"]); // of <details>: the reader's, not the data's

export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child != null && child !== false) element.append(child);
  }
  return element;
}

// Make the children of `old` those of `next`; rows with data-key keep their element.
export function patch(old, next) {
  const wanted = [...next.childNodes];
  const keys = new Set(wanted.map(keyOf).filter(Boolean));
  for (const child of [...old.childNodes]) {
    if (keyOf(child) && !keys.has(keyOf(child))) child.remove();
  }
  wanted.forEach((child, place) => {
    let there = old.childNodes[place];
    if (keyOf(child) && there && keyOf(there) !== keyOf(child)) {
      const same = [...old.childNodes].find((each) => keyOf(each) === keyOf(child));
      old.insertBefore(same ?? child, there);
      if (!same) return;
      there = same;
    }
    if (!there) old.append(child);
    else if (there.nodeName !== child.nodeName || keyOf(there) !== keyOf(child)) there.replaceWith(child);
    else if (child.nodeType === Node.TEXT_NODE) {
      if (there.data !== child.data) there.data = child.data;
    } else {
      patchAttributes(there, child);
      patch(there, child);
    }
  });
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
}

function patchAttributes(old, next) {
  for (const { name, value } of [...next.attributes]) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  for (const { name } of [...old.attributes]) {
    if (!next.hasAttribute(name) && !OWN.has(name)) old.removeAttribute(name);
  }
}

function keyOf(node) {
  return node.dataset?.key;
}

// A table that a keyboard can scroll; `rows` are arrays of cells, the first is the row's header.
export function table(caption, heads, rows) {
  const cells = (row) =>
    row.cells.map((cell, place) =>
      h(place ? "td" : "th", { scope: place ? null : "row", class: heads[place].class }, cell),
    );
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    h(
      "table",
      {},
      h("caption", {}, caption),
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col", class: head.class }, head.name)))),
      h("tbody", {}, rows.map((row) => h("tr", { "data-key": row.key, class: row.class }, cells(row)))),
    ),
  );
}

export function pill(kind, text) {
  return h("span", { class: `pill ${kind}` }, text);
}

export function facts(pairs) {
  return h("dl", { class: "facts" }, pairs.map(([name, value, note]) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, value, note ? h("small", {}, ` ${note}`) : null))));
}

export function panel(title, ...children) {
  return h("section", { class: "panel" }, h("h2", {}, title), children);
}
