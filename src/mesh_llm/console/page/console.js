// The plain page: draws what /api/events tells. Names and texts come from other machines, so they are only ever set as
// text, never as markup. A session has two halves: a cookie that the browser sends, and a key that is kept here.
"use strict";

const MARK = "#sign-in=";
const RETRY_MS = 2000;
const KEPT_AS = `mesh-llm-session:${location.pathname}`;
const byId = (id) => document.getElementById(id);
let status = null;
let lastEvent = "";
let key = localStorage.getItem(KEPT_AS) ?? "";

function bytes(count) {
  if (!count) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  const step = Math.min(Math.floor(Math.log10(count) / 3), units.length - 1);
  return `${(count / 1000 ** step).toFixed(step > 1 ? 1 : 0)} ${units[step]}`;
}

function cell(text, className) {
  const element = document.createElement("td");
  element.textContent = text;
  if (className) element.className = className;
  return element;
}

function fill(body, rows, columns, empty) {
  body.replaceChildren();
  for (const cells of rows) {
    const row = document.createElement("tr");
    row.append(...cells);
    body.append(row);
  }
  if (rows.length === 0) {
    const row = document.createElement("tr");
    const note = cell(empty, "empty");
    note.colSpan = columns;
    row.append(note);
    body.append(row);
  }
}

function modelRow(model) {
  const state = cell(model.status, model.status);
  if (model.reason) {
    const reason = document.createElement("span");
    reason.className = "reason";
    reason.textContent = model.reason;
    state.append(reason);
  }
  return [cell(model.name), state, cell(model.context ? `${model.context} tokens` : "–"), cell(bytes(model.size_bytes)), cell(String(model.nodes))];
}

function nodeRows() {
  const here = [cell(`${status.name} (this node)`), cell(status.role), cell(status.models.filter((m) => m.here).map((m) => m.name).join(", ") || "–"), cell(bytes(status.memory_bytes)), cell("–")];
  const others = status.peers.map((peer) => [
    cell(peer.name || peer.node_id.slice(0, 10)),
    cell(`${peer.role}, ${peer.state}`, peer.state),
    cell(peer.serving.join(", ") || "–"),
    cell(bytes(peer.memory_bytes)),
    cell(peer.rtt_ms ? `${peer.rtt_ms.toFixed(1)} ms, ${peer.path}` : "–"),
  ]);
  return [here, ...others];
}

function curl() {
  const warm = status.models.find((model) => model.status === "warm");
  const name = JSON.stringify(warm ? warm.name : "MODEL").replaceAll("'", "'\\''");
  return `curl ${status.api_base}/chat/completions -H 'content-type: application/json' \\\n  -d '{"model": ${name}, "messages": [{"role": "user", "content": "Hello"}]}'`;
}

function draw() {
  const nodes = status.peers.length + 1;
  byId("summary").textContent = `${status.mesh_name || "mesh"}: ${nodes} node${nodes > 1 ? "s" : ""}, ${status.health}. API at ${status.api_base}, ${status.requests.in_flight} requests in flight. Version ${status.version}.`;
  fill(byId("models"), status.models.map(modelRow), 5, "No models yet: mesh-llm load MODEL");
  fill(byId("nodes"), nodeRows(), 5, "");
  byId("curl").textContent = curl();
  byId("copy-token").hidden = !status.token;
}

function note(notice) {
  const item = document.createElement("li");
  item.className = notice.level;
  const time = document.createElement("time");
  time.textContent = new Date(notice.at * 1000).toLocaleTimeString();
  item.append(time, document.createTextNode(notice.text));
  byId("notices").prepend(item);
  while (byId("notices").children.length > 200) byId("notices").lastChild.remove();
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    byId("copied").textContent = `${what} copied.`;
  } catch {
    byId("copied").textContent = "The browser did not allow copying: select the text by hand.";
  }
}

byId("copy-curl").addEventListener("click", () => status && copy(curl(), "Command"));
byId("copy-token").addEventListener("click", () => status && copy(`mesh-llm --join ${status.token}`, "Command with invite"));

function ask(method, path, body) {
  const headers = { "x-mesh-llm-session": key };
  if (body !== undefined) headers["content-type"] = "application/json";
  if (lastEvent !== "") headers["last-event-id"] = lastEvent;
  return fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store" });
}

// True where there is a session; a code is good once, and taken out of the address at once.
async function signIn() {
  let code = "";
  if (location.hash.startsWith(MARK)) {
    code = location.hash.slice(MARK.length);
    history.replaceState(null, "", location.pathname);
  }
  if (key !== "" && (await ask("GET", "api/session")).ok) return true;
  const answer = await ask("POST", "api/session", { code });
  const told = await answer.json();
  if (answer.ok) {
    key = told.key;
    localStorage.setItem(KEPT_AS, key);
    return true;
  }
  byId("sign-in-problem").textContent = code === "" ? "" : told.error.message;
  return false;
}

function take(event) {
  const fields = {};
  for (const line of event.split("\n")) {
    const colon = line.indexOf(": ");
    if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 2);
  }
  if (fields.id) lastEvent = fields.id;
  if (fields.event === "status") {
    status = JSON.parse(fields.data);
    draw();
  } else if (fields.event === "notice") {
    note(JSON.parse(fields.data));
  }
}

async function follow() {
  const answer = await ask("GET", "api/events");
  if (!answer.ok) return;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    events.forEach(take);
  }
}

async function run() {
  for (;;) {
    try {
      const inside = await signIn();
      byId("sign-in").hidden = inside;
      byId("inside").hidden = !inside;
      if (!inside) {
        byId("summary").textContent = "Not signed in.";
        await new Promise((resolve) => addEventListener("hashchange", resolve, { once: true }));
        continue;
      }
      await follow();
    } catch {
      // Told below; tried again.
    }
    byId("summary").textContent = "The node does not answer; trying again …";
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

run();
