import { describe, expect, it } from "vitest";

import { changes, drafts, FIELDS, parsed, type Settings } from "./settings";

const SETTINGS: Settings = {
  "ctx-size": 4096,
  "temperature": 0.5,
  "system-prompt": "Be brief.\nAnd kind.",
  "aliases": ["gpt-4o", "claude-*"],
  "environment": { CUDA_VISIBLE_DEVICES: "0,1" },
  "gpu-layers": "auto",
  "pin": true,
};

function written(over: Record<string, string>): Record<string, string> {
  return { ...drafts(SETTINGS), ...over };
}

describe("the form of a model's settings", () => {
  it("changes nothing when nothing is typed", () => {
    expect(changes(SETTINGS, drafts(SETTINGS))).toEqual({});
    expect(changes({}, drafts({}))).toEqual({});
  });

  it("sends what is typed as the file has it", () => {
    expect(changes(SETTINGS, written({ "ctx-size": "8192", "ttl": "30m", "min-lifetime": "60", "top-p": "0.9", "mmproj": "false" }))).toEqual({
      "ctx-size": 8192,
      "ttl": "30m",
      "min-lifetime": 60,
      "top-p": 0.9,
      "mmproj": false,
    });
    expect(changes(SETTINGS, written({ "engine-args": "--flash-attn\n on \n\n", "environment": "A=1=2\nB=\n" }))).toEqual({
      "engine-args": ["--flash-attn", "on"],
      "environment": { A: "1=2", B: "" },
    });
    expect(changes(SETTINGS, written({ draft: "7", speculation: "ngram-mod" }))).toEqual({ draft: "7", speculation: "ngram-mod" });
  });

  it("takes a setting away when its field is emptied", () => {
    expect(changes(SETTINGS, written({ "temperature": "", "aliases": " \n", "pin": "false", "system-prompt": "", "gpu-layers": "" }))).toEqual({
      "temperature": null,
      "aliases": null,
      "pin": null,
      "system-prompt": null,
      "gpu-layers": null,
    });
  });

  it("shows and reads every field alike", () => {
    for (const field of FIELDS) {
      const value = SETTINGS[field.key];
      if (value !== undefined) expect(parsed(field, drafts(SETTINGS)[field.key] ?? "")).toEqual(value);
    }
  });
});
