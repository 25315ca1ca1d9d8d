// Calls of the management API. A refusal is an ApiError with the node's own words and its hint.

const TOKEN_HEADER = "x-mesh-llm-token";
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

/** The control token's header, for requests that are made elsewhere (the chat's stream). */
export function tokenHeader(): Record<typeof TOKEN_HEADER, string> {
  return { [TOKEN_HEADER]: token };
}

let token = document.querySelector<HTMLMetaElement>('meta[name="control-token"]')?.content ?? "";

/**
 * A restarted node has a new control token: take it from the page as it would be served now. `refused` is the one that
 * was not accepted; true where there is another by now, which may have come with another request.
 */
export async function renewToken(refused: string): Promise<boolean> {
  if (token !== refused) return true;
  // eslint-disable-next-line no-restricted-globals -- the page itself, not the API
  const answer = await fetch("./", { cache: "no-store" }).catch(() => null);
  if (!answer?.ok) return false;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  token = page.querySelector<HTMLMetaElement>('meta[name="control-token"]')?.content || token;
  return token !== refused;
}

async function once(method: string, path: string, body: unknown): Promise<Response> {
  const headers: Record<string, string> = { [TOKEN_HEADER]: token };
  if (body !== undefined) headers["content-type"] = "application/json";
  try {
    // eslint-disable-next-line no-restricted-globals -- this module is what the rule points to
    return await fetch(path, {
      method,
      headers,
      body: body === undefined ? null : JSON.stringify(body),
      signal: AbortSignal.timeout(TIME_LIMIT_MS),
    });
  } catch {
    throw new ApiError("unreachable", "The node does not answer.", "The page tries again by itself.", 0);
  }
}

async function request(method: string, path: string, body?: unknown): Promise<Response> {
  const used = token;
  let answer = await once(method, path, body);
  if (answer.status === 401 && (await renewToken(used))) answer = await once(method, path, body);
  if (answer.ok) return answer;
  const told: unknown = await answer.json().catch(() => null);
  const problem = (told as { error?: { code?: string; message?: string; hint?: string } } | null)?.error;
  throw new ApiError(
    problem?.code ?? "refused",
    problem?.message ?? `The node answered with status ${answer.status}.`,
    problem?.hint ?? "",
    answer.status,
  );
}

/** GET, decoded. The caller names the shape that the API's description promises. */
export async function read<T>(path: string): Promise<T> {
  return (await (await request("GET", path)).json()) as T;
}

/** GET as text. */
export async function readText(path: string): Promise<string> {
  return (await request("GET", path)).text();
}

/** A changing call, with the control token. */
export async function change<T>(method: "POST" | "DELETE" | "PUT", path: string, body?: unknown): Promise<T> {
  return (await (await request(method, path, body)).json()) as T;
}

/** What to show of anything that was thrown. */
export function said(failure: unknown): { message: string; hint: string } {
  if (failure instanceof ApiError) return { message: failure.message, hint: failure.hint };
  return { message: failure instanceof Error ? failure.message : String(failure), hint: "" };
}
