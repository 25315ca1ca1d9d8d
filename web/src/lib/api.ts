// Calls of the management API. A refusal is an ApiError with the node's own words and its hint.

import { session } from "./session.svelte";

const TIME_LIMIT_MS = 20_000;

/** A refusal, or a node that did not answer (`code` "unreachable"). */
export class ApiError extends Error {
  constructor(
    readonly code: string,
    message: string,
    readonly hint: string,
    readonly status: number,
  ) {
    super(message);
  }

  /** This call is not one that this node has. */
  get absent(): boolean {
    return this.code === "not_available" || this.code === "not_found";
  }
}

/** Send a request with the session's key, and give the answer once its head is there. Throws ApiError. */
export async function send(method: string, path: string, signal: AbortSignal, body?: unknown, more: Record<string, string> = {}): Promise<Response> {
  const headers: Record<string, string> = { ...session.header, ...more };
  if (body !== undefined) headers["content-type"] = "application/json";
  let answer: Response;
  try {
    // eslint-disable-next-line no-restricted-globals -- this module is what the rule points to
    answer = await fetch(path, { method, headers, body: body === undefined ? null : JSON.stringify(body), signal });
  } catch {
    throw new ApiError("unreachable", "The node does not answer.", "The page tries again by itself.", 0);
  }
  if (answer.ok) return answer;
  const told: unknown = await answer.json().catch(() => null);
  const problem = (told as { error?: { code?: string | number; message?: string; hint?: string } } | null)?.error;
  if (answer.status === 401 && problem?.code === "sign_in_required") session.lost();
  throw new ApiError(
    String(problem?.code ?? "refused"),
    problem?.message ?? `The node answered with status ${answer.status}.`,
    problem?.hint ?? "",
    answer.status,
  );
}

function request(method: string, path: string, body?: unknown): Promise<Response> {
  return send(method, path, AbortSignal.timeout(TIME_LIMIT_MS), body);
}

/** GET, decoded. The caller names the shape that the API's description promises. */
export async function read<T>(path: string): Promise<T> {
  return (await (await request("GET", path)).json()) as T;
}

/** GET as text. */
export async function readText(path: string): Promise<string> {
  return (await request("GET", path)).text();
}

/** A changing call. */
export async function change<T>(method: "POST" | "DELETE" | "PUT", path: string, body?: unknown): Promise<T> {
  return (await (await request(method, path, body)).json()) as T;
}

/** What to show of anything that was thrown. */
export function said(failure: unknown): { message: string; hint: string } {
  if (failure instanceof ApiError) return { message: failure.message, hint: failure.hint };
  return { message: failure instanceof Error ? failure.message : String(failure), hint: "" };
}
