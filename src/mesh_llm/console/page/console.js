// The console's page: draws what /api/events tells. Names and texts come from other machines, so they are
// only ever set as text, never as markup.
"use strict";

const byId = (id) => document.getElementById(id);
let status = null;
let lastNotice = 0;

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
  lastNotice = notice.id;
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

function listen() {
  const events = new EventSource(`api/events?after=${lastNotice}`);
  events.addEventListener("status", (event) => { status = JSON.parse(event.data); draw(); });
  events.addEventListener("notice", (event) => note(JSON.parse(event.data)));
  events.onerror = () => {
    byId("summary").textContent = "The node does not answer; trying again …";
    if (events.readyState === EventSource.CLOSED) setTimeout(listen, 2000);
  };
}

listen();
