// What the management API answers; the node's own description is GET /api/openapi.json.

export type ModelState = "warm" | "loading" | "cold" | "stopping" | "failed";

export interface StatusModel {
  name: string;
  status: ModelState;
  hosts: string[];
  host_ids: string[];
  nodes: number;
  context: number;
  slots: number;
  size_bytes: number;
  reason: string;
  here: boolean;
  vision: boolean;
  /** Sentences on nodes that `--split` asks to help and that compute nothing. */
  left_out?: string[];
  predicted_tps?: number | null;
  measured_tps?: number | null;
  retry_at?: number | null;
  /** What this node's GPU computes and what its processor, where the model needs both; else empty. */
  offload?: string;
  /** Of the KV cache, if this node serves all of the model. */
  cache_type?: string;
  /** Requests that wait here for the model to be loaded; absent and 0: none. */
  waiting?: number;
  /** What becomes of the requests that wait, in words. */
  awaited?: string;
  /** This node never unloads it unasked. */
  pinned?: boolean;
  /** UNIX seconds at which this node unloads it if no request comes. */
  unload_at?: number | null;
}

export interface StatusPeer {
  node_id: string;
  name: string;
  role: string;
  state: string;
  serving: string[];
  memory_bytes: number;
  rtt_ms: number;
  path: string;
  version: string;
  devices: string[];
  engine: string;
  memory_total_bytes: number;
  /** What it may do in the mesh: client, serve or split; empty where that is unknown. */
  scope: string;
  /** What carries requests and split models to it: tcp, quic, relay; empty without a connection. */
  transport?: string;
  /** Why that is not tcp. */
  transport_reason?: string;
  /** The key of its owner; empty where nobody says that it is theirs. */
  owner?: string;
}

export interface SplitWorker {
  node_id: string;
  name: string;
  ratio: number;
  layers: number;
  memory_bytes: number;
  rtt_ms: number;
  direct_push: boolean | null;
  weight_bytes_sent: number;
  weight_bytes_by_reference: number;
}

export interface StatusSplit {
  model: string;
  host: string;
  term: number;
  ratio: number;
  layers: number;
  workers: SplitWorker[];
  round_trips_per_token: number | null;
  predicted_tps: number | null;
  measured_tps: number | null;
  predicted_prompt_tps?: number | null;
  measured_prompt_tps?: number | null;
  /** How activations travel from node to node, in words; empty elsewhere than on the host. */
  wire?: string;
  /** Engines that share the slots, of those planned, and why that many; 0 and empty elsewhere than on the host. */
  groups?: number;
  groups_planned?: number;
  groups_why?: string;
}

export interface WaitingNode {
  node_id: string;
  name: string;
  memory_bytes: number;
  takes_part: boolean;
  obstacle: string;
  reason: string;
}

/** A model that fits no node alone, and waits for other nodes' memory. */
export interface WaitingModel {
  model: string;
  reason: string;
  need_bytes: number;
  alone_bytes: number;
  have_bytes: number;
  nodes: WaitingNode[];
}

export interface Status {
  version: string;
  node_id: string;
  mesh_id: string;
  mesh_name: string;
  name: string;
  role: string;
  ready: boolean;
  health: string;
  api_port: number;
  api_base: string;
  /** The second port for clients of Ollama; empty where there is none. */
  ollama_base: string;
  /** Whether requests to the API must carry a key. */
  needs_key: boolean;
  token: string;
  /** What this node may do in the mesh, and what the invite in `token` lets its holder do: client, serve or split. */
  scope: string;
  token_scope: string;
  /** The key of the owner whose nodes count as this node's own; empty: nobody's. */
  owner?: string;
  uptime_s: number;
  pid: number;
  home: string;
  memory_bytes: number;
  memory_total_bytes: number;
  devices: string[];
  engine: string;
  models: StatusModel[];
  peers: StatusPeer[];
  split: StatusSplit | null;
  waiting: WaitingModel[];
  /** Passive nodes that are connected to this one. */
  clients: number;
  requests: { in_flight: number; per_minute: number; tokens_per_second: number; ttfb_ms_p50: number; keys?: KeyUsage[]; strangers?: StrangerUsage };
  cut_off?: CutOff[];
  /** What is built for the engine on its machine; `state`: ready, missing, building or failed. */
  engine_parts: { name: string; state: string; text: string; hint: string; percent: number | null }[];
  /** What does not work at present, each with a sentence that says what to do. */
  problems: { what: string; text: string }[];
  /** What hosts announce and do not keep, as this node saw it; `at` in UNIX seconds. */
  corrections: { node_id: string; model: string; kind: string; text: string; at: number }[];
  /** What is saved of long prompts, and how many came from other nodes and went to them; null where nothing is saved. */
  prompt_caches: { count: number; bytes: number; limit: number; moved_in: number; moved_out: number } | null;
}

export interface Notice {
  id: number;
  at: number;
  level: string;
  code: string;
  text: string;
  about: string;
}

export interface Invite {
  id: string;
  scope: string;
  created: number;
  expires: number;
  uses_left: number | null;
  revoked: boolean;
  token: string;
  shown?: string;
}

export interface Fit {
  where: "here" | "mesh" | "no" | "unknown";
  context: number;
  slots: number;
  need_bytes: number;
  have_bytes: number;
  text: string;
}

export interface DiskModel {
  name: string;
  kind: string;
  size_bytes: number;
  context: number;
  fit: Fit;
  store: string;
  vision: boolean;
  builtin: boolean;
  status: ModelState;
  here: boolean;
}

export interface CatalogueModel {
  name: string;
  title: string;
  size_bytes: number;
  parameters: number;
  context: number;
  quant: string;
  licence: string;
  capabilities: string[];
  fit: Fit;
  on_disk: string;
}

export interface UnusableFile {
  name: string;
  path: string;
  reason: string;
  incomplete: boolean;
}

export interface Library {
  memory_bytes: number;
  mesh_memory_bytes: number;
  disk: DiskModel[];
  catalogue: CatalogueModel[];
  unusable: UnusableFile[];
}

export interface Problem {
  code: string;
  message: string;
  hint: string;
}

export interface Download {
  id: string;
  model: string;
  phase: "asking" | "waiting" | "fetching" | "checking" | "done" | "failed" | "cancelled";
  started: number;
  name: string;
  source: string;
  origin: string;
  done_bytes: number;
  total_bytes: number;
  bytes_per_second: number;
  eta_s: number | null;
  ended: number | null;
  load: boolean;
  error: Problem | null;
}

export interface PlanNode {
  node_id: string;
  name: string;
  layers: number;
  ratio: number;
  memory_bytes: number;
  rtt_ms: number;
}

export interface Plan {
  model: string;
  runs: "here" | "split" | "elsewhere" | "no";
  message: string;
  hint: string;
  size_bytes: number;
  context: number;
  slots: number;
  need_bytes: number;
  have_bytes: number;
  on_disk: boolean;
  nodes: PlanNode[];
  predicted_tps: number | null;
  /** Of a prompt of `prompt_tokens` tokens: how fast it is read, and when. */
  prompt_tokens?: number;
  prompt_tps?: number | null;
  first_token_s?: number | null;
  split?: { wire?: string; groups?: number; groups_why?: string; together_tps?: number | null } | null;
  round_trips_per_token: number | null;
  /** What of it runs on the node's processor, beside its GPU. */
  offload: { text: string; gpu: PlanMemory; memory: PlanMemory } | null;
}

export interface PlanMemory {
  total_bytes: number;
  have_bytes: number;
}

export interface WaitingNode {
  id: string;
  name: string;
  scope: string;
  since: number;
  address: string;
  version: string;
}

export interface Publication {
  on: boolean;
  name: string;
  relays: string[];
  listed: boolean;
  expires: number | null;
  problem: string;
  consent?: string;
}

export interface RankedTarget {
  node_id: string;
  name: string;
  local: boolean;
  expected_s: number;
  in_flight: number;
  slots: number;
  rtt_ms: number;
  why: string;
}

export interface Decision {
  id: number;
  at: number;
  model: string;
  path: string;
  via: string;
  targets: RankedTarget[];
  attempts: { node_id: string; outcome: string; reason: string }[];
  chosen: string;
  outcome: string;
  status: number;
  seconds: number;
  ttfb_ms: number | null;
  prompt_tokens: number;
  tokens: number;
}

/** What the API keys of one name have used, and their limits; 0: no limit. */
export interface KeyUsage {
  name: string;
  requests: number;
  failed: number;
  prompt_tokens: number;
  tokens: number;
  tokens_today: number;
  running: number;
  tokens_per_day: number;
  concurrent: number;
}

/** What nodes that came by a public listing use of this node, and their quotas; 0: no limit. */
export interface StrangerUsage {
  running: number;
  nodes: number;
  tokens_today: number;
  refused_today: number;
  most: { node_id: string; tokens_today: number }[];
  concurrent: number;
  tokens_per_day: number;
  all_concurrent: number;
  all_tokens_per_day: number;
}

/** A node that is refused for a while, or with `address` the strangers of an address. */
export interface CutOff {
  who: string;
  seconds: number;
  reason: string;
  address: boolean;
}

export interface Bucket {
  at: number;
  requests: number;
  failed: number;
  tokens: number;
  prompt_tokens: number;
  ttfb_ms_p50: number | null;
  ttfb_ms_p95: number | null;
  seconds_p50: number | null;
  seconds_p95: number | null;
}

export interface History {
  period_s: number;
  buckets: Bucket[];
}
