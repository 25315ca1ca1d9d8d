// What this node could serve: asked again whenever the mesh's models or the downloads change.

import { ApiError, read } from "../lib/api";
import type { Library } from "../lib/types";

class Shelf {
  library = $state.raw<Library | null>(null);
  failure = $state.raw<unknown>(null);
  /** This node has no models of its own: a passive client. */
  absent = $state(false);
  #asking = false;
  #again = false;

  async load(): Promise<void> {
    if (this.#asking) {
      this.#again = true;
      return;
    }
    this.#asking = true;
    try {
      this.library = await read<Library>("./api/library");
      this.failure = null;
      this.absent = false;
    } catch (failure) {
      this.absent = failure instanceof ApiError && failure.absent;
      this.failure = this.absent ? null : failure;
    } finally {
      this.#asking = false;
    }
    if (this.#again) {
      this.#again = false;
      await this.load();
    }
  }
}

export const shelf = new Shelf();
