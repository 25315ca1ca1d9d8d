import { describe, expect, it } from "vitest";

import { clock, moment } from "../lib/format";
import type { StatusModel } from "../lib/types";
import { canLoad, canUnload, lifetime, queue } from "./demand";

const NOW = 1_800_000_000;

function model(over: Partial<StatusModel>): StatusModel {
  return {
    name: "tiny", status: "warm", hosts: [], host_ids: [], nodes: 1, context: 512, slots: 1, size_bytes: 1, reason: "", here: true,
    vision: false, ...over,
  };
}

describe("how long a model stays", () => {
  it("is the time at which it is unloaded, with the day where that is not today", () => {
    expect(lifetime(model({ unload_at: NOW + 60 }), NOW)).toBe(`unloads at ${clock(NOW + 60)} if no request comes`);
    expect(lifetime(model({ unload_at: NOW + 200_000 }), NOW)).toContain(moment(NOW + 200_000));
  });

  it("is not said of a model that stays for no particular time", () => {
    expect(lifetime(model({ unload_at: null }), NOW)).toBe("");
    expect(lifetime(model({}), NOW)).toBe("");
  });

  it("has no end where the model is pinned", () => {
    expect(lifetime(model({ pinned: true, unload_at: null }), NOW)).toContain("pinned");
  });
});

describe("the requests that wait", () => {
  it("are counted, and what becomes of them is said", () => {
    expect(queue(model({ waiting: 1, awaited: "it is loading here" }))).toBe("1 request waits: it is loading here");
    expect(queue(model({ waiting: 3 }))).toBe("3 requests wait");
    expect(queue(model({ waiting: 0, awaited: "old" }))).toBe("");
    expect(queue(model({}))).toBe("");
  });
});

describe("the buttons", () => {
  it("unload what is loaded here, and not what is split or served elsewhere", () => {
    expect(canUnload(model({}), undefined)).toBe(true);
    expect(canUnload(model({ status: "loading" }), "other")).toBe(true);
    expect(canUnload(model({}), "tiny")).toBe(false);
    expect(canUnload(model({ here: false }), undefined)).toBe(false);
    expect(canUnload(model({ status: "stopping" }), undefined)).toBe(false);
  });

  it("load what is on this disk, or on another one only", () => {
    expect(canLoad(model({ here: false, status: "warm" }), true)).toBe(true);
    expect(canLoad(model({ here: false, status: "cold" }), false)).toBe(true);
    expect(canLoad(model({ here: false, status: "warm" }), false)).toBe(false);
    expect(canLoad(model({}), true)).toBe(false);
  });
});
