// Where answers part: a tree of tokens, drawn as SVG.

// Each answer is a list of [id, text]. Chains without a parting become one node.
export function treeOf(answers) {
  const root = node([], answers.length);
  for (const answer of answers) {
    let here = root;
    for (const [id, text] of answer) {
      if (!here.next.has(id)) here.next.set(id, node([text], 0));
      here = here.next.get(id);
      here.count += 1;
    }
  }
  return joined(root);
}

function node(texts, count) {
  return { texts, count, next: new Map() };
}

function joined(start) {
  let here = start;
  const texts = [...here.texts];
  while (here.next.size === 1) {
    const [only] = here.next.values();
    if (only.count !== here.count) break; // somebody has ended here
    here = only;
    texts.push(...here.texts);
  }
  const next = [...here.next.values()].sort((a, b) => b.count - a.count).map(joined);
  return { texts, count: start.count, next };
}

const WIDTH = 250, HEIGHT = 46, GAP_X = 34, GAP_Y = 12, LONGEST = 34;

export function drawTree(root) {
  const boxes = [], lines = [];
  let row = 0, columns = 0;
  const place = (one, column) => {
    columns = Math.max(columns, column + 1);
    const places = one.next.map((child) => place(child, column + 1));
    const y = places.length ? (places[0].y + places[places.length - 1].y) / 2 : row++ * (HEIGHT + GAP_Y);
    const x = column * (WIDTH + GAP_X);
    for (const child of places) lines.push([x + WIDTH, y + HEIGHT / 2, child.x, child.y + HEIGHT / 2]);
    boxes.push({ x, y, one, odd: column > 0 });
    return { x, y };
  };
  place(root, 0);
  const svg = element("svg", {
    width: columns * (WIDTH + GAP_X), height: Math.max(1, row) * (HEIGHT + GAP_Y),
    role: "img", "aria-label": spoken(root),
  });
  for (const [x1, y1, x2, y2] of lines) {
    const middle = (x1 + x2) / 2;
    svg.append(element("path", { d: `M${x1},${y1} C${middle},${y1} ${middle},${y2} ${x2},${y2}` }));
  }
  for (const { x, y, one, odd } of boxes) {
    const group = element("g", { transform: `translate(${x},${y})`, class: odd ? "parted" : "common" });
    group.append(element("rect", { width: WIDTH, height: HEIGHT, rx: 6 }));
    group.append(text(8, 18, shortened(one.texts.join(""))), text(8, 36, copies(one.count), "count"));
    const title = element("title", {});
    title.textContent = one.texts.join("");
    group.append(title);
    svg.append(group);
  }
  return svg;
}

function element(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function text(x, y, said, kind = "said") {
  const made = element("text", { x, y, class: kind });
  made.textContent = said;
  return made;
}

function shortened(said) {
  const plain = said.replace(/\s+/g, " ");
  if (!plain.trim()) return "(the beginning)";
  return plain.length > LONGEST ? `${plain.slice(0, LONGEST - 1)}…` : plain;
}

function copies(count) {
  return count === 1 ? "1 copy" : `${count} copies`;
}

// The tree in words, for those who do not see it.
function spoken(one) {
  const said = `${copies(one.count)} say “${shortened(one.texts.join(""))}”`;
  return one.next.length ? `${said}; then ${one.next.map(spoken).join("; ")}` : said;
}
