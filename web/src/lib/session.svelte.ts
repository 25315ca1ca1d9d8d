// Who is signed in. A session has two halves: a cookie, which the browser sends and no script can read, and a key, which
// this page keeps for its own origin and sends in a header. A link of `mesh-llm console` opens one: its code stands
// behind #, is good once, and is exchanged here, so that loading the page, or a preview of the link, uses nothing up.

const HEADER = "x-mesh-llm-session";
const MARK = "#sign-in=";
const RETRY_MS = 1_500;
const KEPT_AS = `mesh-llm-session:${location.pathname}`;

export type SignIn = "asking" | "in" | "out";

interface Refusal {
  error?: { message?: string; hint?: string };
}

class Session {
  state = $state<SignIn>("asking");
  /** Why a link did not work, or why a session ended; empty for a first visit. */
  problem = $state("");

  #key = kept();
  #attempt = 0;

  /** The header that every request needs. */
  get header(): Record<typeof HEADER, string> {
    return { [HEADER]: this.#key };
  }

  start(): () => void {
    const link = () => {
      const code = takeCode();
      if (code !== "") void this.#enter(code);
    };
    const elsewhere = (event: StorageEvent) => {
      if (event.key !== KEPT_AS) return;
      this.#key = event.newValue ?? "";
      if (this.#key !== "") void this.#enter("");
    };
    addEventListener("hashchange", link);
    addEventListener("storage", elsewhere);
    void this.#enter(takeCode());
    return () => {
      removeEventListener("hashchange", link);
      removeEventListener("storage", elsewhere);
    };
  }

  /** A request was refused for want of a session: look whether there is one all the same, and else say how to get in. */
  lost(): void {
    if (this.state !== "in") return;
    this.problem = "Your session has ended: the node was started again, or somebody signed out.";
    this.state = "asking";
    void this.#enter("");
  }

  /** End this browser's session. */
  async signOut(): Promise<void> {
    await this.#send("DELETE").catch(() => undefined);
    this.#keep("");
    this.problem = "";
    this.state = "out";
  }

  async #enter(code: string): Promise<void> {
    const attempt = ++this.#attempt;
    for (;;) {
      try {
        const problem = await this.#try(code);
        if (attempt !== this.#attempt) return;
        if (problem !== "") this.problem = problem ?? "";
        this.state = problem === null ? "in" : "out";
        return;
      } catch {
        // The node does not answer at present.
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
        if (attempt !== this.#attempt) return;
      }
    }
  }

  /** Null where there is a session now; else what to say about it. Throws where the node does not answer. */
  async #try(code: string): Promise<string | null> {
    if (this.#key !== "" && (await this.#send("GET")).ok) return null;
    const answer = await this.#send("POST", { code });
    if (answer.ok) {
      this.#keep(((await answer.json()) as { key: string }).key);
      return null;
    }
    const said = ((await answer.json().catch(() => null)) as Refusal | null)?.error;
    return code === "" ? "" : (said?.message ?? "This link does not work.");
  }

  async #send(method: string, body?: object): Promise<Response> {
    const headers: Record<string, string> = { ...this.header };
    if (body !== undefined) headers["content-type"] = "application/json";
    // eslint-disable-next-line no-restricted-globals -- what the API's client needs is made here
    return fetch("./api/session", { method, headers, body: body === undefined ? null : JSON.stringify(body), cache: "no-store" });
  }

  #keep(key: string): void {
    this.#key = key;
    try {
      if (key === "") localStorage.removeItem(KEPT_AS);
      else localStorage.setItem(KEPT_AS, key);
    } catch {
      // A browser that keeps nothing: the session then ends with this page.
    }
  }
}

function kept(): string {
  try {
    return localStorage.getItem(KEPT_AS) ?? "";
  } catch {
    return "";
  }
}

/** The code in the address, which is taken out of it at once: out of the history, and of what is copied. */
function takeCode(): string {
  if (!location.hash.startsWith(MARK)) return "";
  const code = location.hash.slice(MARK.length);
  history.replaceState(null, "", "#/mesh");
  return code;
}

export const session = new Session();
