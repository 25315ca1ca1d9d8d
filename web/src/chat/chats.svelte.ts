// The conversations, and the answers that are being written: they go on while another panel is shown.

import { said } from "../lib/api";
import { newId } from "../lib/browser";
import { toasts } from "../lib/toasts.svelte";
import { ask, receiptOf } from "./ask";
import { newConversation, requestBody, titleOf, type Conversation, type Message } from "./conversation";
import { all, forget, keep } from "./keep";

function message(role: Message["role"], text: string, images: string[] = []): Message {
  return { id: newId(), role, text, reasoning: "", images, figures: null, failure: null };
}

class Chats {
  list = $state<Conversation[]>([]);
  current = $state<string>("");
  /** Ids of conversations whose answer is being written. */
  busy = $state<string[]>([]);
  #stops = new Map<string, AbortController>();
  #loaded = false;

  get conversation(): Conversation | undefined {
    return this.list.find((each) => each.id === this.current);
  }

  /** Read what is kept, once; there is always one to write in. */
  async load(): Promise<void> {
    if (this.#loaded) return;
    this.#loaded = true;
    try {
      this.list = await all();
    } catch (failure) {
      toasts.failed(failure);
    }
    const first = this.list[0];
    if (first === undefined) this.begin("");
    else this.current = first.id;
  }

  /** A new conversation; an empty one is used again. */
  begin(model: string): void {
    const empty = this.list.find((each) => each.messages.length === 0);
    if (empty === undefined) this.list.unshift(newConversation(newId(), model, Date.now()));
    this.current = empty?.id ?? this.list[0]?.id ?? "";
  }

  async remove(id: string): Promise<void> {
    this.stop(id);
    this.list = this.list.filter((each) => each.id !== id);
    await forget(id).catch((failure: unknown) => toasts.failed(failure));
    if (this.current === id) {
      const next = this.list[0];
      if (next === undefined) this.begin("");
      else this.current = next.id;
    }
  }

  stop(id: string): void {
    this.#stops.get(id)?.abort();
  }

  async send(id: string, model: string, text: string, images: string[]): Promise<void> {
    const conversation = this.#find(id);
    if (conversation.title === "") conversation.title = titleOf(text) || "Image";
    conversation.messages.push(message("user", text, images));
    await this.#answer(conversation, model);
  }

  /** Ask again for the answer at or after a place; what follows is gone. */
  async again(id: string, model: string, from: number): Promise<void> {
    const conversation = this.#find(id);
    conversation.messages.splice(conversation.messages[from]?.role === "assistant" ? from : from + 1);
    await this.#answer(conversation, model);
  }

  async edit(id: string, model: string, at: number, text: string): Promise<void> {
    const conversation = this.#find(id);
    const edited = conversation.messages[at];
    if (edited === undefined) return;
    edited.text = text;
    if (at === 0) conversation.title = titleOf(text);
    await this.again(id, model, at);
  }

  /** Keep a conversation as it is now. */
  async keep(conversation: Conversation): Promise<void> {
    conversation.changed = Date.now();
    await keep($state.snapshot(conversation)).catch((failure: unknown) => toasts.failed(failure));
  }

  #find(id: string): Conversation {
    const found = this.list.find((each) => each.id === id);
    if (found === undefined) throw new Error("This conversation is gone.");
    return found;
  }

  async #answer(conversation: Conversation, model: string): Promise<void> {
    const { id } = conversation;
    if (this.#stops.has(id)) return;
    const stopper = new AbortController();
    this.#stops.set(id, stopper);
    this.busy = [...this.busy, id];
    const body = requestBody(conversation, model);
    conversation.messages.push(message("assistant", ""));
    const answer = conversation.messages.at(-1) as Message;
    void this.keep(conversation);
    try {
      answer.figures = await ask(body, stopper.signal, {
        text: (piece) => (answer.text += piece),
        reasoning: (piece) => (answer.reasoning += piece),
      });
    } catch (failure) {
      answer.failure = said(failure);
    } finally {
      this.#stops.delete(id);
      this.busy = this.busy.filter((each) => each !== id);
    }
    await this.keep(conversation);
    await this.#receive(conversation, answer);
  }

  /** Fetch the receipt of an answer that has ended, and keep it with the answer. */
  async #receive(conversation: Conversation, answer: Message): Promise<void> {
    const figures = answer.figures;
    if (figures === null || (figures.receiptId ?? "") === "") return;
    figures.receipt = await receiptOf(figures.receiptId ?? "").catch(() => null);
    if (figures.receipt !== null) await this.keep(conversation);
  }
}

export const chats = new Chats();
