// Models on demand: how long a model stays, who waits for it, and what can be done about it.

import { clock, moment, plural } from "../lib/format";
import type { StatusModel } from "../lib/types";

const DAY = 86_400;

/** When this node unloads a model; empty where it does not say. */
export function lifetime(model: StatusModel, now = Date.now() / 1000): string {
  if (model.pinned) return "pinned: stays until you unload it";
  const at = model.unload_at;
  if (at === null || at === undefined) return "";
  return `unloads at ${at - now < DAY ? clock(at) : moment(at)} if no request comes`;
}

/** How many requests wait for a model here, and what becomes of them; empty where none does. */
export function queue(model: StatusModel): string {
  const waiting = model.waiting ?? 0;
  if (waiting === 0) return "";
  const words = plural(waiting, "request waits", "requests wait");
  return model.awaited ? `${words}: ${model.awaited}` : words;
}

/** Whether a model can be unloaded here until a request asks for it. `split`: the model that is split, if one is. */
export function canUnload(model: StatusModel, split: string | undefined): boolean {
  return model.here && (model.status === "warm" || model.status === "loading") && model.name !== split;
}

/** Whether a model can be loaded here: from this node's disk (`own`), or fetched first from where it lies in the mesh. */
export function canLoad(model: StatusModel, own: boolean): boolean {
  return !model.here && (own || model.status === "cold");
}
