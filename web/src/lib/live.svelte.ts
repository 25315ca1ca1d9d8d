// The node's state as it changes: one event stream for the whole page, that comes back by itself.

import { read, send } from "./api";
import { eventsOf, type ServerEvent } from "./sse";
import type { Download, Notice, Status } from "./types";

const KEPT_NOTICES = 500;
const RETRY_MS = 1_500;
const CHECK_EVERY_MS = 10_000;

export type Link = "connecting" | "live" | "lost";

class Live {
  status = $state.raw<Status | null>(null);
  /** Newest first. */
  notices = $state.raw<Notice[]>([]);
  downloads = $state.raw<Download[]>([]);
  link = $state<Link>("connecting");

  #stream: AbortController | null = null;
  #run = "";
  #last = "";

  start(): () => void {
    void this.#listen();
    const checks = setInterval(() => void this.#check(), CHECK_EVERY_MS);
    return () => {
      clearInterval(checks);
      this.#stream?.abort();
      this.#stream = null;
    };
  }

  /** Keep nothing of the node: nobody is signed in. */
  forget(): void {
    this.#follow("none");
    this.#run = "";
    this.#last = "";
    this.status = null;
    this.link = "connecting";
  }

  /** Try now instead of waiting for the next attempt. */
  reconnect(): void {
    void this.#listen();
  }

  /** Follow the events until another call does, or the page needs them no more. */
  async #listen(): Promise<void> {
    this.#stream?.abort();
    const stream = (this.#stream = new AbortController());
    // Read by fetch: the browser's own EventSource cannot send the header that a session needs.
    while (!stream.signal.aborted) {
      try {
        const answer = await send("GET", "./api/events", stream.signal, undefined, this.#last === "" ? {} : { "last-event-id": this.#last });
        for await (const event of eventsOf(answer)) {
          if (stream.signal.aborted) return;
          this.#take(event);
        }
      } catch {
        // Told by `link`; a session that has ended is told by `send`.
      }
      if (stream.signal.aborted) return;
      this.link = "lost";
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  #take(event: ServerEvent): void {
    this.#last = event.id;
    this.#follow(event.id.split(".")[0] ?? "");
    this.link = "live";
    if (event.event === "status") this.status = JSON.parse(event.data) as Status;
    else if (event.event === "notice") this.#note(JSON.parse(event.data) as Notice);
    else if (event.event === "download") this.#progress(JSON.parse(event.data) as Download);
  }

  /** Notices and downloads of another run of the node are counted from the start again. */
  #follow(run: string): void {
    if (run === "" || run === this.#run) return;
    this.#run = run;
    this.notices = [];
    this.downloads = [];
  }

  #note(notice: Notice): void {
    if (notice.id <= (this.notices[0]?.id ?? 0)) return;
    this.notices = [notice, ...this.notices].slice(0, KEPT_NOTICES);
  }

  #progress(download: Download): void {
    const others = this.downloads.filter((each) => each.id !== download.id);
    this.downloads = [download, ...others].sort((one, other) => other.started - one.started);
  }

  /** A node that hangs keeps the stream open and says nothing: ask it. */
  async #check(): Promise<void> {
    if (this.link === "connecting" || document.hidden) return;
    try {
      this.status = await read<Status>("./api/status");
      if (this.link === "lost") this.reconnect();
    } catch {
      this.link = "lost";
    }
  }
}

export const live = new Live();
