"use strict";

// Tables: a click on a column's name sorts, a field above filters.

function key(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.key ?? cell.textContent.trim();
  const number = parseFloat(text.replace(/,/g, "").replace("−", "-"));
  return { text, number };
}

function compare(a, b) {
  if (Number.isNaN(a.number) !== Number.isNaN(b.number))
    return Number.isNaN(a.number) ? 1 : -1; // what has no number comes last
  return a.number - b.number || a.text.localeCompare(b.text);
}

function sort(table, header) {
  const falls = header.ariaSort === "descending";
  for (const other of table.tHead.rows[0].cells)
    other.removeAttribute("aria-sort");
  header.ariaSort = falls ? "ascending" : "descending";
  const sign = falls ? 1 : -1;
  const rows = [...table.tBodies[0].rows].map((row) => ({
    row, key: key(row, header.cellIndex),
  }));
  const isEmpty = (entry) => entry.key.text === "";
  rows.sort((a, b) =>
    isEmpty(a) - isEmpty(b) || sign * compare(a.key, b.key));
  table.tBodies[0].append(...rows.map((entry) => entry.row));
}

function prepare(table) {
  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.textContent = header.textContent;
    button.addEventListener("click", () => sort(table, header));
    header.replaceChildren(button);
  }
  if (table.tBodies[0].rows.length < 4) return;
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = "Show rows with …";
  field.ariaLabel = "Show rows with these words";
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const row of table.tBodies[0].rows)
      row.hidden = !words.every((word) =>
        row.textContent.toLowerCase().includes(word));
  });
  table.before(field);
}

addEventListener("DOMContentLoaded", () =>
  document.querySelectorAll("table.data").forEach(prepare));

// The gallery: a view is a model and an attack, its frames are radii.

const PAGE = innerWidth < 600 ? 6 : 24; // cards at once
const gallery = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const decoded = new Map();
let most = PAGE;
let view;
let radius = gallery.start; // stays when another model or attack is chosen
let last = 0;

/** The pixels of a sheet, RGBA. */
function sheet(number) {
  if (!decoded.has(number)) decoded.set(number, read(number));
  return decoded.get(number);
}

async function read(number) {
  const image = new Image();
  image.src = `data:image/png;base64,${gallery.sheets[number]}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.width;
  canvas.height = image.height;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height);
}

/** A canvas of image i of a sheet; `value` makes a byte of one at a place. */
function picture(i, name, value) {
  const [height, width] = view.size;
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.role = "img";
  canvas.ariaLabel = name;
  const pixels = new ImageData(width, height);
  const left = (i % view.columns) * width;
  const top = Math.floor(i / view.columns) * height;
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      for (let c = 0; c < 4; c++) {
        const there = ((top + y) * view.columns * width + left + x) * 4 + c;
        pixels.data[(y * width + x) * 4 + c] = c < 3 ? value(there) : 255;
      }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}

function className(label) {
  return view.classes[label] ?? String(label);
}

/** What the model says of an image, and how sure it is. */
function said(label, sure, right) {
  const share = sure === undefined ? "" : `, ${(100 * sure).toFixed(0)} %`;
  return `${right ? "" : "✗ "}says ${className(label)}${share}`;
}

function column(head, image, text) {
  const made = document.createElement("div");
  made.append(element("span", head), image, element("b", text));
  return made;
}

const MARKS = { fell: "✗ fell", stood: "✓ stood", wrong: "– wrong before" };

function outcome(frame, i) {
  if (frame) return frame.outcome[i];
  return view.said[i] === view.labels[i] ? "stood" : "wrong";
}

function card(frame, i, clean, change) {
  const result = outcome(frame, i);
  const figure = element("figure", "", result);
  const header = document.createElement("header");
  const by = frame?.by[i] ? ` to ${frame.by[i]}` : "";
  header.append(
    element("span", `image ${view.rows[i]}: ${className(view.labels[i])}`),
    element("strong", MARKS[result] + by));
  const trio = element("div", "", "trio");
  const saidClean = said(
    view.said[i], view.sure?.[i], view.said[i] === view.labels[i]);
  trio.append(column(
    "clean", picture(i, "clean", (k) => clean.data[k]), saidClean));
  if (frame?.there[i]) {
    const step = frame.scale / gallery.levels;
    const moved = (k) => (change.data[k] - gallery.none) * step;
    trio.append(
      column(`change × ${Number((0.5 / frame.scale).toPrecision(2))}`,
        picture(i, "change, amplified",
          (k) => 127.5 + 127.5 * moved(k) / frame.scale), ""),
      column("adversarial",
        picture(i, "adversarial", (k) => clean.data[k] + 255 * moved(k)),
        said(frame.said[i], frame.sure?.[i], result === "stood")));
  } else {
    const why = !frame ? "Move the slider to attack."
      : result === "wrong" ? "Wrong as it is: not attacked."
      : "No image within this radius was found.";
    trio.append(element("div", why, "none"));
  }
  figure.append(header, trio);
  return figure;
}

/** Draws what the controls ask for. */
async function show() {
  const ticket = ++last;
  const number = Number(at("slider").value);
  const frame = number ? view.frames[number - 1] : undefined;
  at("eps").textContent = frame
    ? `eps ${frame.eps} ${view.norm}`.trim() : "eps 0 (clean)";
  const [kind, by] = at("outcome").value.split("/");
  const label = at("class").value;
  const rows = view.labels.map((_, i) => i).filter((i) =>
    (!kind || outcome(frame, i) === kind)
    && (!by || frame?.by[i] === by)
    && (label === "" || String(view.labels[i]) === label));
  const clean = await sheet(view.sheet);
  const change = frame && await sheet(frame.sheet);
  if (ticket !== last) return; // what is asked for has changed meanwhile
  at("cards").replaceChildren(
    ...rows.slice(0, most).map((i) => card(frame, i, clean, change)));
  const stood = view.labels.filter((_, i) => outcome(frame, i) === "stood");
  const share = (100 * stood.length / view.labels.length).toFixed(1);
  at("count").textContent =
    `${stood.length} of ${view.labels.length} images (${share} %) stand at`
    + ` ${at("eps").textContent}. ${rows.length} match the choice above,`
    + ` ${Math.min(most, rows.length)} are shown.`;
  at("more").hidden = rows.length <= most;
}

function choices(id, entries) {
  const before = at(id).value;
  at(id).replaceChildren(
    ...entries.map(([value, text]) => new Option(text, value)));
  if (entries.some(([value]) => String(value) === before))
    at(id).value = before;
}

const unique = (values) => [...new Set(values)];
const attackOf = (one) => `${one.attack} ${one.norm}`.trim();

/** Fills the controls for the model and attack that are chosen. */
function choose() {
  const model = at("model").value;
  const own = gallery.views.filter((one) => one.model === model);
  choices("attack", unique(own.map(attackOf)).map((name) => [name, name]));
  view = own.find((one) => attackOf(one) === at("attack").value);
  const attacks = unique(view.frames.flatMap((frame) => frame.by));
  choices("outcome", [
    ["", "all"], ["fell", "✗ fell"],
    ...attacks.filter(Boolean).map((by) => [`fell/${by}`, `✗ fell to ${by}`]),
    ["stood", "✓ stood"], ["wrong", "– wrong before"],
  ]);
  const labels = unique(view.labels).sort((a, b) => a - b);
  choices("class", [["", "all"],
    ...labels.map((label) => [label, className(label)])]);
  const frame = view.frames.findIndex((one) => one.eps === radius);
  at("slider").max = view.frames.length;
  at("slider").value =
    radius === 0 ? 0 : frame < 0 ? view.frames.length : frame + 1;
  most = PAGE;
  return show();
}

if (gallery.views) {
  choices("model",
    unique(gallery.views.map((one) => one.model)).map((one) => [one, one]));
  at("model").addEventListener("change", choose);
  at("attack").addEventListener("change", choose);
  for (const id of ["outcome", "class"])
    at(id).addEventListener("input", show);
  at("slider").addEventListener("input", (event) => {
    radius = view.frames[event.target.value - 1]?.eps ?? 0;
    show();
  });
  at("more").addEventListener("click", () => {
    most += PAGE;
    show();
  });
  choose();
} else {
  at("images").classList.add("empty");
}
