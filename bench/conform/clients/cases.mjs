// The same as cases.py, for clients in JavaScript.

export const URL = process.env.CONFORM_URL ?? "http://localhost:9337";
export const MODEL = process.env.CONFORM_MODEL ?? "small";
export const TOOL_URL = process.env.CONFORM_TOOL_URL ?? URL;
export const TOOL_MODEL = process.env.CONFORM_TOOL_MODEL ?? "caller";
export const KEY = process.env.CONFORM_KEY ?? "none";

export function check(condition, reason) {
  if (!condition) throw new Error(reason);
}

export async function runAll(cases) {
  for (const [what, run] of Object.entries(cases)) {
    let reason = "";
    try {
      await run();
    } catch (error) {
      reason = `${error?.name ?? "Error"}: ${error?.message ?? error}`.replace(/\s+/g, " ").slice(0, 300);
    }
    console.log(JSON.stringify({ case: what, passed: reason === "", reason }));
  }
}
