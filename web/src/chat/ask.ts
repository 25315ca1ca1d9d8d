// One question to the mesh: the answer as it is written, and its figures.

import { ApiError, read, send } from "../lib/api";
import { eventsOf } from "../lib/sse";
import type { ChatBody, Figures } from "./conversation";
import { receiptFrom, type Receipt, type ReceiptAnswer } from "./receipt";

const PATH = "./v1/chat/completions";

interface Chunk {
  choices?: { delta?: { content?: string | null; reasoning_content?: string | null }; finish_reason?: string | null }[];
  usage?: { completion_tokens?: number } | null;
  timings?: { predicted_n?: number; predicted_per_second?: number };
  error?: { message?: string; code?: string | number; hint?: string };
}

export interface Listener {
  text: (piece: string) => void;
  reasoning: (piece: string) => void;
}

/** A name as a header carries it: percent-encoded where it has other characters than a header takes. */
function named(value: string | null): string {
  try {
    return decodeURIComponent(value ?? "");
  } catch {
    return value ?? "";
  }
}

/** Ask, and tell the listener each piece as it comes. Aborting gives the figures so far; failures are thrown. */
export async function ask(body: ChatBody, signal: AbortSignal, listener: Listener): Promise<Figures> {
  const figures: Figures = { firstMs: null, tokensPerSecond: null, tokens: null, node: "", model: body.model, end: "finished", receiptId: "", receipt: null };
  const began = performance.now();
  let first = 0;
  let last = 0;
  let pieces = 0;

  const take = (chunk: Chunk) => {
    if (chunk.error) throw new ApiError(String(chunk.error.code ?? "stream_broken"), chunk.error.message ?? "The answer broke off.", chunk.error.hint ?? "", 0);
    const choice = chunk.choices?.[0];
    const text = choice?.delta?.content ?? "";
    const reasoning = choice?.delta?.reasoning_content ?? "";
    if (text !== "" || reasoning !== "") {
      last = performance.now();
      if (pieces++ === 0) {
        first = last;
        figures.firstMs = first - began;
      }
      if (reasoning !== "") listener.reasoning(reasoning);
      if (text !== "") listener.text(text);
    }
    if (choice?.finish_reason === "length") figures.end = "length";
    if (chunk.usage?.completion_tokens !== undefined) figures.tokens = chunk.usage.completion_tokens;
    if (chunk.timings?.predicted_n !== undefined) figures.tokens ??= chunk.timings.predicted_n;
    if (chunk.timings?.predicted_per_second !== undefined) figures.tokensPerSecond = chunk.timings.predicted_per_second;
  };

  try {
    const answer = await send("POST", PATH, signal, body, { "x-mesh-llm-receipt": "on" });
    figures.receiptId = answer.headers.get("x-mesh-llm-receipt-id") ?? "";
    figures.node = named(answer.headers.get("x-mesh-llm-node"));
    figures.model = named(answer.headers.get("x-mesh-llm-model")) || body.model;
    let ended = false;
    for await (const { data } of eventsOf(answer)) {
      ended = data === "[DONE]";
      if (ended) break;
      take(JSON.parse(data) as Chunk);
    }
    if (!ended) throw new ApiError("stream_broken", "The answer broke off before its end.", "Ask again: another node may answer.", 0);
  } catch (failure) {
    if (!signal.aborted) throw failure instanceof TypeError ? new ApiError("unreachable", "The node does not answer.", "Ask again once the page is connected.", 0) : failure;
    figures.end = "stopped";
  }
  if (figures.tokens === null && pieces > 0) figures.tokens = pieces;
  if (figures.tokensPerSecond === null && pieces > 1 && last > first) figures.tokensPerSecond = ((pieces - 1) * 1000) / (last - first);
  return figures;
}

/** The receipt with this id; null where the node has none, as one of an earlier version. */
export async function receiptOf(id: string): Promise<Receipt | null> {
  if (!/^[0-9a-f]{32}$/.test(id)) return null;
  try {
    return receiptFrom(await read<ReceiptAnswer>(`./v1/receipts/${id}`));
  } catch (failure) {
    if (failure instanceof ApiError) return null;
    throw failure;
  }
}
