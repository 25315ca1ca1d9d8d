// A conversation as it is kept in the browser.

import type { Receipt } from "./receipt";

export interface Figures {
  /** Milliseconds from asking to the first piece of an answer; null: none came. */
  firstMs: number | null;
  tokensPerSecond: number | null;
  tokens: number | null;
  /** Id of the node that answered. */
  node: string;
  model: string;
  end: "finished" | "stopped" | "length" | "failed";
  /** Of the answer's receipt; empty: it has none. Conversations of earlier versions have neither field. */
  receiptId?: string;
  receipt?: Receipt | null;
}

export interface Message {
  id: string;
  role: "user" | "assistant";
  text: string;
  reasoning: string;
  images: string[];
  figures: Figures | null;
  failure: { message: string; hint: string } | null;
}

export interface Sampling {
  temperature: number | null;
  top_p: number | null;
  max_tokens: number | null;
  seed: number | null;
}

export interface Conversation {
  id: string;
  title: string;
  /** As asked for; empty: the first that is warm. */
  model: string;
  system: string;
  sampling: Sampling;
  messages: Message[];
  /** Milliseconds of Date.now(). */
  changed: number;
}

export const NO_SAMPLING: Sampling = { temperature: null, top_p: null, max_tokens: null, seed: null };

export function newConversation(id: string, model: string, now: number): Conversation {
  return { id, title: "", model, system: "", sampling: { ...NO_SAMPLING }, messages: [], changed: now };
}

/** The first words of what was asked, as a conversation's title. */
export function titleOf(text: string): string {
  const line = text.trim().split("\n")[0] ?? "";
  const characters = [...line];
  return characters.length > 60 ? `${characters.slice(0, 59).join("")}…` : line;
}

/** Split thoughts off that a model wrote into its answer between <think> marks. */
export function withoutThoughts(text: string): { thoughts: string; answer: string } {
  const begun = /^\s*<think>/.exec(text);
  if (begun === null) return { thoughts: "", answer: text };
  const rest = text.slice(begun[0].length);
  const end = rest.indexOf("</think>");
  if (end < 0) return { thoughts: rest.trim(), answer: "" };
  return { thoughts: rest.slice(0, end).trim(), answer: rest.slice(end + "</think>".length).trimStart() };
}

type Part = { type: "text"; text: string } | { type: "image_url"; image_url: { url: string } };

export interface ChatBody {
  model: string;
  stream: true;
  stream_options: { include_usage: true };
  messages: { role: string; content: string | Part[] }[];
  [setting: string]: unknown;
}

/** What is sent for the messages so far: thoughts stay here, settings that were not chosen are left to the model. */
export function requestBody(conversation: Conversation, model: string): ChatBody {
  const messages: ChatBody["messages"] = [];
  if (conversation.system.trim() !== "") messages.push({ role: "system", content: conversation.system });
  for (const message of conversation.messages) {
    const text = message.role === "assistant" ? withoutThoughts(message.text).answer : message.text;
    if (message.role === "assistant" && text === "") continue;
    messages.push({
      role: message.role,
      content:
        message.images.length === 0
          ? text
          : [...message.images.map((url): Part => ({ type: "image_url", image_url: { url } })), { type: "text", text }],
    });
  }
  const chosen = Object.entries(conversation.sampling).filter(([, value]) => value !== null);
  return { model, stream: true, stream_options: { include_usage: true }, messages, ...Object.fromEntries(chosen) };
}
