// The page: asks the server once, shows what comes back piece by piece, and counts the different answers.
import { drawTree, treeOf } from "/static/tree.js";

const $ = (id) => document.getElementById(id);
const STATUS_MS = 700;
let abort = null;
let run = null;

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

// How busy the server is.
async function showStatus() {
  try {
    const { status, models } = await (await fetch("/ready")).json();
    offer(models);
    const busy = models.map((m) => `${m.id}: ${m.running} running, ${m.waiting} waiting`).join(" · ");
    say("status", `Server ${status}. ${busy}`);
  } catch {
    say("status", "The server does not answer.");
  }
  setTimeout(showStatus, STATUS_MS);
}

function say(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text; // or screen readers would repeat it
}

// A choice for each model; without a second one there is nothing to choose.
function offer(models) {
  if ($("models").childElementCount === models.length) return;
  $("models").replaceChildren(...models.map((model, at) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), {
      type: "radio", name: "model", value: model.id, checked: at === 0,
    });
    const what = model.system_fingerprint ? "isobatch's, in a fixed order of summation" : "torch's own";
    label.append(input, ` ${what} (${model.id})`);
    return label;
  }));
  $("kernels").hidden = models.length < 2;
}

function request() {
  return {
    model: document.querySelector("input[name=model]:checked").value,
    prompt: $("prompt").value,
    copies: Number($("copies").value),
    others: Number($("others").value),
    temperature: Number($("temperature").value),
    seed: Number($("seed").value),
    max_tokens: Number($("tokens").value),
  };
}

async function ask(event) {
  event.preventDefault();
  const asked = request();
  run = { asked, fingerprint: null, receipt: null, cells: new Map(), finished: false };
  abort = new AbortController();
  prepare(asked);
  try {
    const body = JSON.stringify(asked);
    const reply = await fetch("/playground", { method: "POST", headers: headers(), body, signal: abort.signal });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    for await (const one of events(reply.body)) take(one);
    if (!run.finished) throw new Error("the connection ended before the answers did");
  } catch (error) {
    if (error.name !== "AbortError") say("problem", `That did not work: ${error.message}`);
    say("verdict", error.name === "AbortError" ? "Stopped" : "Not finished");
  }
  $("ask").disabled = false;
  $("stop").disabled = true;
  $("progress").hidden = true;
}

// Server-sent events from a body, however it is cut into chunks.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function prepare(asked) {
  say("problem", "");
  say("verdict", "Asking once while nobody else is there…");
  say("detail", "");
  $("ask").disabled = true;
  $("stop").disabled = false;
  $("parting").hidden = $("proof").hidden = true;
  Object.assign($("progress"), { hidden: false, max: asked.copies, value: 0 });
  $("alone").hidden = false;
  $("alone").textContent = "";
  run.cells.set("alone", { element: $("alone"), tokens: [], over: false });
  $("cells").replaceChildren();
  for (let at = 0; at < asked.copies; at++) {
    const element = document.createElement("li");
    element.className = "cell";
    $("cells").append(element);
    run.cells.set(at, { element, tokens: [], over: false });
  }
}

function take(event) {
  if ("fingerprint" in event) run.fingerprint = event.fingerprint;
  else if (event.receipt) run.receipt = event.receipt;
  else if (event.done) finish(event.distinct);
  else if ("cell" in event && event.error) throw new Error(event.error.message);
  else if (event.error) throw new Error(event.error.message);
  else grow(event);
}

function grow({ cell, text, tokens, over }) {
  const mine = run.cells.get(cell);
  mine.element.append(text);
  mine.tokens.push(...tokens);
  mine.over = over;
  if (!over) return;
  mine.element.classList.add("over");
  if (cell === "alone") {
    say("verdict", `Asking ${run.asked.copies} times while the server is busy…`);
    return;
  }
  const done = copies().filter((one) => one.over).length;
  $("progress").value = done;
  say("detail", `${done} of ${run.asked.copies} answers are complete.`);
}

function copies() {
  return [...run.cells].filter(([name]) => name !== "alone").map(([, cell]) => cell);
}

function finish(distinct) {
  run.finished = true;
  const alone = identity(run.cells.get("alone"));
  const kinds = new Map([[alone, 0]]);
  for (const cell of copies()) {
    const kind = identity(cell);
    if (!kinds.has(kind)) kinds.set(kind, kinds.size);
    cell.element.dataset.kind = kinds.get(kind) % 6;
    if (kind !== alone) cell.element.title = "not what was said alone";
  }
  const equal = copies().filter((cell) => identity(cell) === alone).length;
  say("verdict", distinct === 1 ? "1 answer" : `${distinct} different answers`);
  say("detail", `${equal} of ${run.asked.copies} copies say, token for token, what was said alone. ` +
    `${run.asked.others} other requests were there meanwhile.`);
  $("tree").replaceChildren(drawTree(treeOf(copies().map((cell) => cell.tokens))));
  $("parting").hidden = false;
  say("fingerprint", run.fingerprint ?? "none, since torch's own kernels promise nothing");
  $("proof").hidden = false;
  $("receipt").hidden = run.receipt === null;
}

function identity(cell) {
  return cell.tokens.map(([id]) => id).join(" ");
}

function save(name, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 2)], { type: "application/json" }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

function download() {
  const answers = [...run.cells].map(([cell, { tokens }]) => ({
    cell, text: tokens.map(([, text]) => text).join(""), token_ids: tokens.map(([id]) => id),
  }));
  save("isobatch-answers.json", { request: run.asked, system_fingerprint: run.fingerprint, answers });
}

$("form").addEventListener("submit", ask);
$("stop").addEventListener("click", () => abort?.abort());
$("download").addEventListener("click", download);
$("receipt").addEventListener("click", () => save("isobatch-receipt.json", run.receipt));
$("copies").addEventListener("input", () => say("count", $("copies").value));
showStatus();
