// The node's state as it changes: one event stream for the whole page, that comes back by itself.

import { read } from "./api";
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

  #events: EventSource | null = null;
  #run = "";

  start(): () => void {
    this.#listen();
    const checks = setInterval(() => void this.#check(), CHECK_EVERY_MS);
    return () => {
      clearInterval(checks);
      this.#events?.close();
      this.#events = null;
    };
  }

  /** Try now instead of waiting for the next attempt. */
  reconnect(): void {
    this.#events?.close();
    this.#listen();
  }

  #listen(): void {
    const events = new EventSource("./api/events");
    this.#events = events;
    const on = <T>(kind: string, take: (value: T) => void) => {
      events.addEventListener(kind, (event: MessageEvent<string>) => {
        this.#follow(event.lastEventId.split(".")[0] ?? "");
        this.link = "live";
        take(JSON.parse(event.data) as T);
      });
    };
    on<Status>("status", (status) => (this.status = status));
    on<Notice>("notice", (notice) => this.#note(notice));
    on<Download>("download", (download) => this.#progress(download));
    events.onerror = () => {
      if (this.#events !== events) return;
      if (this.link === "live" || events.readyState === EventSource.CLOSED) this.link = "lost";
      // A broken connection the browser takes up again itself, with the last id; a refused one it gives up.
      if (events.readyState === EventSource.CLOSED) {
        setTimeout(() => {
          if (this.#events === events) this.#listen();
        }, RETRY_MS);
      }
    };
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
