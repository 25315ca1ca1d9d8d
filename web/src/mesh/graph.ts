// What the picture of the mesh shows, and where: pure, from a status to places.

import type { Status } from "../lib/types";

export type Part = "host" | "worker" | "serving" | "idle" | "standby" | "client";

export interface GraphNode {
  id: string;
  name: string;
  self: boolean;
  part: Part;
  suspect: boolean;
  memory: number;
  rtt: number;
  path: string;
  /** What carries requests and split models to it, and why that is not TCP. */
  transport: string;
  transportReason: string;
  serving: string[];
  version: string;
  devices: string[];
  engine: string;
  memoryTotal: number;
  /** What it may do in the mesh: client, serve or split; empty where that is unknown. */
  scope: string;
  /** The key of its owner; empty where nobody says that it is theirs. */
  owner: string;
  /** Its part of the split model, where it has one. */
  ratio: number | null;
}

export interface Spot {
  x: number;
  y: number;
  r: number;
}

/** Where a node's name is written, seen from its middle: on the side that its link to the middle does not take. */
export function nameAt(spot: Spot, middle: Spot): { name: number; what: number } {
  const above = spot.y < middle.y - 24;
  return above ? { name: -spot.r - 25, what: -spot.r - 11 } : { name: spot.r + 20, what: spot.r + 35 };
}

/** What is written at a node: the middle of its two lines, and how many letters of each have room. */
export interface Label {
  x: number;
  y: number;
  letters: number;
}

const LETTER = 7.4;
const LABEL_HEIGHT = 34;
const FEWEST_LETTERS = 4;

/** Labels that touch neither each other nor other nodes: those at about the same height share the width between them. */
export function labelsOf(places: Map<string, { x: number; y: number }>, spots: Map<string, Spot>, width: number, most: number): Map<string, Label> {
  const labels = new Map<string, Label>();
  for (const [id, at] of places) {
    let half = Math.min(at.x, width - at.x);
    for (const [other, there] of places) {
      if (other !== id && Math.abs(there.y - at.y) < LABEL_HEIGHT) half = Math.min(half, Math.abs(there.x - at.x) / 2 - 2);
    }
    for (const [other, there] of spots) {
      if (other !== id && Math.abs(there.y - at.y) < there.r + LABEL_HEIGHT / 2) half = Math.min(half, Math.abs(there.x - at.x) - there.r - 4);
    }
    const letters = Math.max(FEWEST_LETTERS, Math.min(most, Math.floor((2 * half) / LETTER)));
    labels.set(id, { x: at.x, y: at.y, letters });
  }
  return labels;
}

const TIME_WIDTH = 48;
const TIME_HEIGHT = 16;

/** Whether a link's time can stand here: beside all circles and labels. */
export function hasRoom(x: number, y: number, spots: Iterable<Spot>, labels: Iterable<Label>): boolean {
  const onCircle = [...spots].some((one) => Math.abs(one.x - x) < one.r + TIME_WIDTH / 2 && Math.abs(one.y - y) < one.r + TIME_HEIGHT / 2);
  const onName = [...labels].some((one) => Math.abs(one.x - x) < (one.letters * LETTER + TIME_WIDTH) / 2 && Math.abs(one.y - y) < (LABEL_HEIGHT + TIME_HEIGHT) / 2);
  return !onCircle && !onName;
}

/** Where a link's time is written: on the link, as near to its middle as there is room; null where there is none. */
export function timeAt(from: Spot, to: Spot, spots: Iterable<Spot>, labels: Iterable<Label>): { x: number; y: number } | null {
  const circles = [...spots];
  const names = [...labels];
  for (const part of [0.52, 0.6, 0.68, 0.44, 0.36]) {
    const x = from.x + (to.x - from.x) * part;
    const y = from.y + (to.y - from.y) * part;
    if (hasRoom(x, y, circles, names)) return { x, y };
  }
  return null;
}

export interface Layout {
  spots: Map<string, Spot>;
  /** How many nodes the picture has no room for. */
  left: number;
}

/** Beyond this a picture is noise; the table below it has them all. */
const MOST_DRAWN = 120;
const MARGIN_X = 78;
const MARGIN_X_NARROW = 58;
const MARGIN_TOP = 62;
const MARGIN_BOTTOM = 62;

function partOf(role: string, serving: string[], id: string, status: Status): Part {
  const split = status.split;
  if (split?.host === id) return "host";
  if (split?.workers.some((worker) => worker.node_id === id)) return "worker";
  if (role === "client") return "client";
  if (role === "standby") return "standby";
  return serving.length > 0 ? "serving" : "idle";
}

function ratioOf(id: string, status: Status): number | null {
  const split = status.split;
  if (split === null) return null;
  if (split.host === id) return split.ratio;
  return split.workers.find((worker) => worker.node_id === id)?.ratio ?? null;
}

/** This node first, then its peers by id: an order that no change of names or speeds disturbs. */
export function nodesOf(status: Status): GraphNode[] {
  const here = status.models.filter((model) => model.here && model.status === "warm").map((model) => model.name);
  const self: GraphNode = {
    id: status.node_id,
    name: status.name,
    self: true,
    part: partOf(status.role, here, status.node_id, status),
    suspect: false,
    memory: status.memory_bytes,
    rtt: 0,
    path: "self",
    transport: "",
    transportReason: "",
    serving: here,
    version: status.version,
    devices: status.devices,
    engine: status.engine,
    memoryTotal: status.memory_total_bytes,
    scope: status.scope,
    owner: status.owner ?? "",
    ratio: ratioOf(status.node_id, status),
  };
  const peers = status.peers.map(
    (peer): GraphNode => ({
      id: peer.node_id,
      name: peer.name,
      self: false,
      part: partOf(peer.role, peer.serving, peer.node_id, status),
      suspect: peer.state !== "alive",
      memory: peer.memory_bytes,
      rtt: peer.rtt_ms,
      path: peer.path,
      transport: peer.transport ?? "",
      transportReason: peer.transport_reason ?? "",
      serving: peer.serving,
      version: peer.version,
      devices: peer.devices,
      engine: peer.engine,
      memoryTotal: peer.memory_total_bytes,
      scope: peer.scope,
      owner: peer.owner ?? "",
      ratio: ratioOf(peer.node_id, status),
    }),
  );
  peers.sort((one, other) => (one.id < other.id ? -1 : 1));
  return [self, ...peers];
}

/** Whose a node is, beside this one's `own` owner; empty where nobody says so. */
export function ownerOf(node: GraphNode, own: string): string {
  if (node.owner === "") return "";
  return node.owner === own ? "you" : node.owner.slice(0, 10);
}

export interface SplitLink {
  host: string;
  worker: string;
  rtt: number;
}

/** The links that a split model's activations take: from its host to each worker. */
export function splitLinks(status: Status): SplitLink[] {
  const split = status.split;
  return split === null ? [] : split.workers.map((worker) => ({ host: split.host, worker: worker.node_id, rtt: worker.rtt_ms }));
}

/** A step off the line from one place to another, down or to the right. */
function sideways(from: Spot, to: Spot, by: number): { x: number; y: number } {
  const across = Math.hypot(to.x - from.x, to.y - from.y) || 1;
  const step = { x: (-(to.y - from.y) / across) * by, y: ((to.x - from.x) / across) * by };
  return step.y < -1 || (Math.abs(step.y) <= 1 && step.x < 0) ? { x: -step.x, y: -step.y } : step;
}

/** A path from one place to another that bends away from the middle, so that it does not run through what lies there. */
export function bend(from: Spot, to: Spot, middle: Spot): { path: string; x: number; y: number } {
  const x = (from.x + to.x) / 2;
  const y = (from.y + to.y) / 2;
  const away = { x: x - middle.x, y: y - middle.y };
  const length = Math.hypot(away.x, away.y);
  // Straight across the middle: bend to one side, by a part of the way.
  const across = Math.hypot(to.x - from.x, to.y - from.y);
  const by = length < 40 ? sideways(from, to, across * 0.42) : { x: (away.x / length) * across * 0.18, y: (away.y / length) * across * 0.18 };
  const control = { x: x + by.x, y: y + by.y };
  const point = (value: number) => value.toFixed(1);
  return {
    path: `M${point(from.x)} ${point(from.y)}Q${point(control.x)} ${point(control.y)} ${point(to.x)} ${point(to.y)}`,
    x: x + by.x / 2,
    y: y + by.y / 2,
  };
}

/** Nodes that have to do with a model: those that serve it, and all parts of it where it is split. */
export function nodesFor(model: string, nodes: GraphNode[], status: Status): Set<string> {
  const found = new Set(nodes.filter((node) => node.serving.includes(model)).map((node) => node.id));
  if (status.split?.model === model) {
    found.add(status.split.host);
    for (const worker of status.split.workers) found.add(worker.node_id);
  }
  return found;
}

/** This node in the middle; peers around it, farther out the longer their round trip takes. */
export function place(nodes: GraphNode[], width: number, height: number): Layout {
  const spots = new Map<string, Spot>();
  const drawn = nodes.slice(0, MOST_DRAWN + 1);
  const most = Math.max(1, ...drawn.map((node) => node.memory));
  const narrow = width < 520;
  const scale = (drawn.length > 40 ? 0.45 : drawn.length > 16 ? 0.7 : 1) * (narrow ? 0.85 : 1);
  const radius = (node: GraphNode) => (14 + 20 * Math.sqrt(Math.max(0, node.memory) / most)) * scale;
  const rx = Math.max(60, width / 2 - (narrow ? MARGIN_X_NARROW : MARGIN_X));
  const ry = Math.max(60, (height - MARGIN_TOP - MARGIN_BOTTOM) / 2);
  const middle = { x: width / 2, y: MARGIN_TOP + ry };
  const peers = drawn.length - 1;
  const rings = peers > 40 ? 3 : peers > 14 ? 2 : 1;
  // One or two lie along the longer side; more begin so that neither top nor bottom is crowded.
  const even = peers === 1 ? 0 : peers % 2 === 0 ? -Math.PI / 2 + Math.PI / Math.max(1, peers) : -Math.PI / 2;
  const start = peers <= 2 && height > width ? even + Math.PI / 2 : even;
  drawn.forEach((node, index) => {
    if (node.self) {
      spots.set(node.id, { ...middle, r: radius(node) });
      return;
    }
    const angle = start + ((index - 1) / peers) * 2 * Math.PI;
    const distance = 0.8 + 0.2 * Math.min(1, Math.log1p(Math.max(0, node.rtt)) / Math.log1p(150));
    const ring = 1 - 0.28 * ((index - 1) % rings);
    spots.set(node.id, {
      x: middle.x + Math.cos(angle) * rx * distance * ring,
      y: middle.y + Math.sin(angle) * ry * distance * ring,
      r: radius(node),
    });
  });
  return { spots, left: nodes.length - drawn.length };
}

/** Places on the way from one layout to another. A node that was not there stands where it will stay. */
export function between(from: Map<string, Spot>, to: Map<string, Spot>): (part: number) => Map<string, Spot> {
  return (part) => {
    const spots = new Map<string, Spot>();
    for (const [id, end] of to) {
      const begin = from.get(id) ?? end;
      spots.set(id, {
        x: begin.x + (end.x - begin.x) * part,
        y: begin.y + (end.y - begin.y) * part,
        r: begin.r + (end.r - begin.r) * part,
      });
    }
    return spots;
  };
}

const TITLES: Record<string, string> = { rpc: "RPC plugin", slots: "Saving of prompts", cuda: "CUDA plugin", rocm: "ROCm plugin", vulkan: "Vulkan plugin" };

/** What people call a part that is built for the engine. */
export function partTitle(name: string): string {
  return TITLES[name] ?? name;
}

/** A node's link in few words: `direct, TCP`. */
export function shortLinkOf(node: GraphNode): string {
  return node.transport === "tcp" || node.transport === "quic" ? `${node.path}, ${node.transport.toUpperCase()}` : node.path;
}

/** A node's link, and why requests and split models do not take TCP there. */
export function linkOf(node: GraphNode): string {
  return node.transportReason ? `${shortLinkOf(node)}: ${node.transportReason}` : shortLinkOf(node);
}
