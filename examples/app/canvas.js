// The canvas: 64 x 64 cells, each with the number of a colour or 0. Its value is their bytes in base64.
const side = 64;
const canvas = element.querySelector("canvas");
const context = canvas.getContext("2d");
const size = element.querySelector("input[type=range]");
const said = element.querySelector("[aria-live]");
const choices = [...element.querySelectorAll("[data-label]")];
const tools = [...element.querySelectorAll("[data-tool]")];
const colours = props.colours.map((code) => [1, 3, 5].map((i) => parseInt(code.slice(i, i + 2), 16)));
let labels = new Uint8Array(side * side);
let label = 1, tool = "brush", past = [], last = null, before = null, cursor = null;

function draw() {
  const image = context.createImageData(side, side);
  labels.forEach((value, i) => image.data.set(value ? [...colours[value - 1], 255] : [255, 255, 255, 255], 4 * i));
  if (cursor) image.data.set([0, 0, 0, 255], 4 * (cursor[1] * side + cursor[0]));
  context.putImageData(image, 0, 0);
  document.body.dataset.shown = [...new Set([label, ...labels])].join(" ");  // for the fields of words
}

function fill(x0, y0, x1, y1, inside) {
  for (let y = Math.max(0, y0); y <= Math.min(side - 1, y1); y++)
    for (let x = Math.max(0, x0); x <= Math.min(side - 1, x1); x++)
      if (inside(x, y)) labels[y * side + x] = label;
}

function dab([x, y]) {
  const radius = size.value / 2, reach = Math.ceil(radius);
  fill(x - reach, y - reach, x + reach, y + reach, (i, j) => (i - x) ** 2 + (j - y) ** 2 <= radius ** 2);
}

function stroke(from, to) {
  const steps = Math.max(1, Math.abs(to[0] - from[0]), Math.abs(to[1] - from[1]));
  for (let i = 0; i <= steps; i++) dab([0, 1].map((a) => Math.round(from[a] + (i / steps) * (to[a] - from[a]))));
}

function box(from, to) {
  labels = before.slice();
  const [x, y] = [0, 1].map((a) => [from[a], to[a]].sort((p, q) => p - q));
  fill(x[0], y[0], x[1], y[1], () => true);
}

function begin() { past = [...past.slice(-49), labels.slice()]; before = labels.slice(); }
function done() { props.value = btoa(String.fromCharCode(...labels)); draw(); }
function cell(event) {
  const place = canvas.getBoundingClientRect();
  return [(event.clientX - place.left) / place.width, (event.clientY - place.top) / place.height]
    .map((x) => Math.min(side - 1, Math.max(0, Math.floor(x * side))));
}
function choose(value) {
  label = value;
  choices.forEach((button) => button.setAttribute("aria-pressed", Number(button.dataset.label) === label));
  draw();
}
function take(value) {
  tool = value;
  tools.forEach((button) => button.setAttribute("aria-pressed", button.dataset.tool === tool));
}
function undo() { if (past.length) { labels = past.pop(); done(); } }
function read() {
  const bytes = Uint8Array.from(atob(props.value || ""), (letter) => letter.charCodeAt(0));
  labels = bytes.length === side * side ? bytes : new Uint8Array(side * side);
  draw();
}

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  begin();
  cursor = null;
  last = cell(event);
  tool === "box" ? box(last, last) : dab(last);
  draw();
});
canvas.addEventListener("pointermove", (event) => {
  if (!last) return;
  const to = cell(event);
  if (tool === "box") box(last, to);
  else { stroke(last, to); last = to; }
  draw();
});
for (const end of ["pointerup", "pointercancel"])
  canvas.addEventListener(end, () => { if (last) { last = null; done(); } });
canvas.addEventListener("keydown", (event) => {
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (move) {
    cursor = (cursor || [side / 2, side / 2]).map((x, a) => Math.min(side - 1, Math.max(0, x + move[a])));
    said.textContent = `column ${cursor[0] + 1}, row ${cursor[1] + 1}`;
    draw();
  } else if ((event.key === " " || event.key === "Enter") && cursor) { begin(); dab(cursor); done(); }
  else if (/^[0-8]$/.test(event.key)) choose(Number(event.key));
  else if (event.key === "z" && (event.ctrlKey || event.metaKey)) undo();
  else return;
  event.preventDefault();
});
canvas.addEventListener("blur", () => { cursor = null; draw(); });
choices.forEach((button) => button.addEventListener("click", () => choose(Number(button.dataset.label))));
tools.forEach((button) => button.addEventListener("click", () => take(button.dataset.tool)));
element.querySelector("[data-undo]").addEventListener("click", undo);
element.querySelector("[data-clear]").addEventListener("click", () => { begin(); labels = new Uint8Array(side * side); done(); });
watch("value", read);
choose(1);
take("brush");
read();
canvas.dataset.ready = "";
