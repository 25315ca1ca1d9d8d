// The form of one model's settings: what its fields are, and what of them changed. The node checks the values.

export type Value = string | number | boolean | string[] | Record<string, string>;
export type Settings = Record<string, Value>;

export interface Field {
  /** As the configuration file names it. */
  key: string;
  label: string;
  kind: "number" | "text" | "area" | "lines" | "pairs" | "choice" | "check";
  choices?: string[];
  min?: number;
  max?: number;
  step?: number;
  hint?: string;
}

export interface Group {
  title: string;
  fields: Field[];
}

const number = (key: string, label: string, min: number, step = 1, max?: number): Field => ({ key, label, kind: "number", min, step, ...(max === undefined ? {} : { max }) });

export const GROUPS: Group[] = [
  {
    title: "Answers",
    fields: [
      { key: "system-prompt", label: "System prompt", kind: "area", hint: "For requests that have none" },
      number("temperature", "Temperature", 0, 0.05, 5),
      number("top-p", "Top-p", 0, 0.01, 1),
      number("top-k", "Top-k", 0),
      number("min-p", "Min-p", 0, 0.01, 1),
      number("repeat-penalty", "Repeat penalty", 0, 0.05, 10),
      number("presence-penalty", "Presence penalty", -2, 0.1, 2),
      number("frequency-penalty", "Frequency penalty", -2, 0.1, 2),
      number("max-tokens", "Longest answer, in tokens", 1),
      number("reasoning-budget", "Reasoning, in tokens (-1: no limit)", -1),
      number("seed", "Seed", 0),
      { key: "aliases", label: "Further names", kind: "lines", hint: "One per line" },
    ],
  },
  {
    title: "Engine",
    fields: [
      number("ctx-size", "Context of each slot, in tokens", 1),
      number("parallel", "Slots", 1, 1, 256),
      { key: "cache-type", label: "KV cache", kind: "choice", choices: ["auto", "f16", "q8_0", "q4_0"] },
      { key: "gpu-layers", label: "Layers on the GPU", kind: "text", hint: "A number, or auto" },
      { key: "cpu-moe", label: "Layers whose experts are in main memory", kind: "text", hint: "A number, or auto" },
      { key: "speculation", label: "Speculation", kind: "choice", choices: ["auto", "draft", "ngram", "mtp", "eagle3", "off", "ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache"] },
      { key: "draft", label: "Draft model", kind: "text" },
      number("draft-max", "Tokens guessed at a time", 1, 1, 64),
      { key: "mmproj", label: "Vision projector", kind: "choice", choices: ["true", "false"] },
      { key: "chat-template", label: "Chat template", kind: "area", hint: "Jinja, or the name of a built-in one" },
      { key: "engine-args", label: "Options of llama-server", kind: "lines", hint: "One word per line" },
      { key: "environment", label: "Variables", kind: "pairs", hint: "NAME=value, one per line" },
    ],
  },
  {
    title: "Memory",
    fields: [
      { key: "pin", label: "Never unload it to make room", kind: "check" },
      { key: "ttl", label: "Unload it when idle for", kind: "text", hint: "30m, 12h; 0: never" },
      { key: "min-lifetime", label: "Keep it at least for", kind: "text", hint: "5m" },
    ],
  },
];

export const FIELDS: Field[] = GROUPS.flatMap((group) => group.fields);

/** What a field shows for a value. */
export function shown(value: Value | undefined): string {
  if (value === undefined) return "";
  if (Array.isArray(value)) return value.join("\n");
  if (typeof value === "object") return Object.entries(value).map(([name, text]) => `${name}=${text}`).join("\n");
  return String(value);
}

/** The drafts of all fields. */
export function drafts(settings: Settings): Record<string, string> {
  return Object.fromEntries(FIELDS.map((field) => [field.key, shown(settings[field.key])]));
}

/** The value of what is written in a field; null: it is not set. */
export function parsed(field: Field, text: string): Value | null {
  const plain = text.trim();
  switch (field.kind) {
    case "area":
      return plain === "" ? null : text;
    case "lines": {
      const lines = text.split("\n").map((line) => line.trim()).filter((line) => line !== "");
      return lines.length > 0 ? lines : null;
    }
    case "pairs": {
      const pairs = text.split("\n").map((line) => line.trim()).filter((line) => line !== "").map((line) => {
        const at = line.indexOf("=");
        return at < 0 ? [line, ""] : [line.slice(0, at).trim(), line.slice(at + 1).trim()];
      });
      return pairs.length > 0 ? (Object.fromEntries(pairs) as Record<string, string>) : null;
    }
    case "check":
      return plain === "true" ? true : null;
    default:
      if (plain === "") return null;
      if (field.key === "mmproj") return plain === "true";
      // The file has a number where one is written, and a text such as 30m or auto elsewhere.
      return Number.isFinite(Number(plain)) && field.kind !== "choice" && field.key !== "draft" ? Number(plain) : plain;
  }
}

/** What differs from the settings, as the node takes it: null takes a setting away. */
export function changes(settings: Settings, written: Record<string, string>): Record<string, Value | null> {
  const found: Record<string, Value | null> = {};
  for (const field of FIELDS) {
    const text = written[field.key] ?? "";
    if (text !== shown(settings[field.key])) found[field.key] = parsed(field, text);
  }
  return found;
}
