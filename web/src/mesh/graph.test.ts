import { describe, expect, it } from "vitest";

import type { Status, StatusPeer } from "../lib/types";
import { between, labelsOf, nodesFor, nodesOf, partTitle, place, timeAt } from "./graph";

function peer(id: string, more: Partial<StatusPeer> = {}): StatusPeer {
  return { node_id: id, name: id, role: "serve", state: "alive", serving: [], memory_bytes: 8e9, rtt_ms: 2, path: "direct", version: "1", devices: [], engine: "", memory_total_bytes: 0, scope: "serve", ...more };
}

function mesh(peers: StatusPeer[], more: Partial<Status> = {}): Status {
  return {
    version: "1", node_id: "me", mesh_id: "m", mesh_name: "lab", name: "desk", role: "serve", ready: true, health: "ready",
    api_port: 9337, api_base: "", ollama_base: "", needs_key: false, token: "", scope: "split", token_scope: "split", uptime_s: 1, pid: 1, home: "", memory_bytes: 16e9, memory_total_bytes: 16e9,
    devices: [], engine: "", models: [], peers, clients: 0, split: null, waiting: [],
    requests: { in_flight: 0, per_minute: 0, tokens_per_second: 0, ttfb_ms_p50: 0 }, engine_parts: [], problems: [], corrections: [], prompt_caches: null, ...more,
  };
}

describe("nodesOf", () => {
  it("puts this node first and orders peers by id", () => {
    expect(nodesOf(mesh([peer("c"), peer("a")])).map((node) => node.id)).toEqual(["me", "a", "c"]);
  });

  it("tells host, workers, servers and those that stand by apart", () => {
    const split = {
      model: "big", host: "a", term: 1, ratio: 0.4, layers: 8, round_trips_per_token: null, predicted_tps: null, measured_tps: null,
      workers: [{ node_id: "b", name: "b", ratio: 0.6, layers: 12, memory_bytes: 1, rtt_ms: 1, direct_push: null, weight_bytes_sent: 0, weight_bytes_by_reference: 0 }],
    };
    const status = mesh([peer("a"), peer("b"), peer("c", { serving: ["tiny"] }), peer("d", { role: "standby" })], { split });
    const nodes = nodesOf(status);
    expect(nodes.map((node) => node.part)).toEqual(["idle", "host", "worker", "serving", "standby"]);
    expect(nodes.map((node) => node.ratio)).toEqual([null, 0.4, 0.6, null, null]);
    expect(nodesFor("big", nodes, status)).toEqual(new Set(["a", "b"]));
    expect(nodesFor("tiny", nodes, status)).toEqual(new Set(["c"]));
  });
});

describe("place", () => {
  it("keeps every node inside the picture, however many there are", () => {
    for (const count of [0, 1, 2, 3, 7, 20, 60, 400]) {
      const peers = Array.from({ length: count }, (_, index) => peer(`n${index}`, { rtt_ms: index * 10, memory_bytes: index * 1e9 }));
      const { spots, left } = place(nodesOf(mesh(peers)), 700, 420);
      expect(spots.size + left).toBe(count + 1);
      for (const { x, y, r } of spots.values()) {
        expect(x - r).toBeGreaterThanOrEqual(0);
        expect(x + r).toBeLessThanOrEqual(700);
        expect(y - r).toBeGreaterThanOrEqual(0);
        expect(y + r).toBeLessThanOrEqual(420);
      }
    }
  });

  it("uses the height of a narrow picture", () => {
    const { spots } = place(nodesOf(mesh([peer("a"), peer("b")])), 330, 440);
    const [a, b] = [spots.get("a"), spots.get("b")];
    if (!a || !b) throw new Error("a node is missing");
    expect(Math.abs(a.y - b.y)).toBeGreaterThan(200);
    expect(Math.abs(a.x - b.x)).toBeLessThan(1);
  });

  it("draws more memory larger, and a longer round trip farther out", () => {
    const { spots } = place(nodesOf(mesh([peer("a", { memory_bytes: 1e9, rtt_ms: 1 }), peer("b", { memory_bytes: 64e9, rtt_ms: 100 })])), 700, 420);
    const [a, b, me] = [spots.get("a"), spots.get("b"), spots.get("me")];
    if (!a || !b || !me) throw new Error("a node is missing");
    expect(b.r).toBeGreaterThan(a.r);
    expect(Math.abs(b.x - me.x)).toBeGreaterThan(Math.abs(a.x - me.x));
  });
});

describe("labelsOf", () => {
  it("divides the width among names at the same height, and leaves others alone", () => {
    const labels = labelsOf(new Map([["a", { x: 80, y: 40 }], ["b", { x: 150, y: 50 }], ["c", { x: 150, y: 200 }]]), new Map(), 300, 18);
    expect(labels.get("a")?.letters).toBe(8);
    expect(labels.get("b")?.letters).toBe(8);
    expect(labels.get("c")?.letters).toBe(18);
  });

  it("keeps off the circles of other nodes", () => {
    const spots = new Map([["a", { x: 80, y: 10, r: 20 }], ["b", { x: 140, y: 50, r: 25 }]]);
    expect(labelsOf(new Map([["a", { x: 80, y: 50 }]]), spots, 300, 18).get("a")?.letters).toBe(8);
  });

  it("lets no two names of a phone's picture touch, however many nodes there are", () => {
    for (const count of [1, 2, 3, 4, 5, 6, 8]) {
      const nodes = nodesOf(mesh(Array.from({ length: count }, (_, index) => peer(`a-long-name-of-node-${index}`, { rtt_ms: 40 }))));
      const labels = [...labelsOf(place(nodes, 330, 430).spots, new Map(), 330, 18).values()];
      for (const one of labels) {
        for (const other of labels) {
          if (one === other || Math.abs(one.y - other.y) >= 34) continue;
          expect(Math.abs(one.x - other.x)).toBeGreaterThanOrEqual(((one.letters + other.letters) * 7.4) / 2 - 0.1);
        }
      }
    }
  });
});

describe("timeAt", () => {
  const from = { x: 100, y: 100, r: 20 };
  const to = { x: 100, y: 300, r: 20 };

  it("stands in the middle of a link, or farther along where a name is in the way, or nowhere", () => {
    expect(timeAt(from, to, [from, to], [])).toEqual({ x: 100, y: 204 });
    expect(timeAt(from, to, [from, to], [{ x: 100, y: 190, letters: 9 }])).toEqual({ x: 100, y: 220 });
    const everywhere = [140, 170, 200, 230, 260].map((y) => ({ x: 100, y, letters: 9 }));
    expect(timeAt(from, to, [from, to], everywhere)).toBeNull();
  });
});

describe("between", () => {
  it("moves those that stay, and lets newcomers stand where they will be", () => {
    const on = between(new Map([["a", { x: 0, y: 0, r: 10 }]]), new Map([["a", { x: 10, y: 20, r: 20 }], ["b", { x: 5, y: 5, r: 5 }]]));
    expect(on(0.5)).toEqual(new Map([["a", { x: 5, y: 10, r: 15 }], ["b", { x: 5, y: 5, r: 5 }]]));
  });
});

describe("partTitle", () => {
  it("names what is built as people call it, and what it does not know as it is called", () => {
    expect(["rpc", "vulkan", "cuda", "later"].map(partTitle)).toEqual(["RPC plugin", "Vulkan plugin", "CUDA plugin", "later"]);
  });
});
