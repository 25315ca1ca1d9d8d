// Short messages at the page's edge: what came of something that the user did.

import { said } from "./api";

export interface Toast {
  id: number;
  kind: "done" | "failed";
  message: string;
  hint: string;
}

const SHOWN_MS = { done: 4_000, failed: 12_000 };

class Toasts {
  list = $state.raw<Toast[]>([]);
  #next = 1;

  done(message: string): void {
    this.#show({ id: this.#next++, kind: "done", message, hint: "" });
  }

  failed(failure: unknown): void {
    this.#show({ id: this.#next++, kind: "failed", ...said(failure) });
  }

  dismiss(id: number): void {
    this.list = this.list.filter((toast) => toast.id !== id);
  }

  #show(toast: Toast): void {
    this.list = [...this.list.slice(-3), toast];
    setTimeout(() => this.dismiss(toast.id), SHOWN_MS[toast.kind]);
  }
}

export const toasts = new Toasts();
