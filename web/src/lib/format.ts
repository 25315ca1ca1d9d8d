// Numbers and times as people read them.

const UNITS = ["B", "KB", "MB", "GB", "TB"];

/** Bytes, in powers of 1000, as disks and the command line tell them. */
export function bytes(count: number): string {
  if (!Number.isFinite(count) || count <= 0) return "–";
  const power = Math.min(Math.floor(Math.log10(count) / 3), UNITS.length - 1);
  const value = count / 1000 ** power;
  return `${value < 10 && power > 0 ? value.toFixed(1) : Math.round(value)} ${UNITS[power] ?? "B"}`;
}

/** Milliseconds of a round trip or a wait. */
export function milliseconds(value: number | null | undefined): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value >= 10_000) return `${Math.round(value / 1000)} s`;
  if (value >= 1_000) return `${(value / 1000).toFixed(1)} s`;
  return value < 10 ? `${value.toFixed(1)} ms` : `${Math.round(value)} ms`;
}

/** A length of time in seconds, in its two largest units. */
export function duration(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  const parts: [number, string][] = [
    [Math.floor(whole / 86_400), "d"],
    [Math.floor((whole % 86_400) / 3_600), "h"],
    [Math.floor((whole % 3_600) / 60), "min"],
    [whole % 60, "s"],
  ];
  const first = parts.findIndex(([count]) => count > 0);
  if (first < 0) return "0 s";
  return parts
    .slice(first, first + 2)
    .filter(([count]) => count > 0)
    .map(([count, unit]) => `${count} ${unit}`)
    .join(" ");
}

/** How long ago a UNIX time was. */
export function ago(at: number, now = Date.now() / 1000): string {
  const passed = now - at;
  return passed < 5 ? "just now" : `${duration(passed >= 60 ? passed - (passed % 60) : passed)} ago`;
}

/** A UNIX time as hours, minutes and seconds here. */
export function clock(at: number): string {
  return new Date(at * 1000).toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
}

/** A UNIX time as date and time here. */
export function moment(at: number): string {
  return new Date(at * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

/** Tokens: 4096 as 4,096, and 131072 as 131 k. */
export function count(value: number): string {
  return value >= 10_000 ? `${Math.round(value / 1000)} k` : value.toLocaleString("en");
}

/** A rate with one digit where that says something. */
export function rate(value: number): string {
  return value >= 100 ? String(Math.round(value)) : value.toFixed(1);
}

/** "1 node", "2 nodes". */
export function plural(value: number, one: string, many = `${one}s`): string {
  return `${value.toLocaleString("en")} ${value === 1 ? one : many}`;
}

/** A part of one as percent. */
export function percent(part: number): string {
  return `${Math.round(part * 100)} %`;
}

/** Cut a name that is too long for where it goes. */
export function shorten(text: string, length: number): string {
  const characters = [...text];
  return characters.length <= length ? text : `${characters.slice(0, length - 1).join("")}…`;
}
