// One question to the mesh: the answer as it is written, and its figures.

import { ApiError, renewToken, tokenHeader } from "../lib/api";
import type { ChatBody, Figures } from "./conversation";
import { eventReader } from "./sse";

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

async function open(body: ChatBody, signal: AbortSignal): Promise<Response> {
  const send = () =>
    // eslint-disable-next-line no-restricted-globals -- this module is what the rule points to
    fetch(PATH, { method: "POST", headers: { "content-type": "application/json", ...tokenHeader() }, body: JSON.stringify(body), signal });
  const used = tokenHeader()["x-mesh-llm-token"];
  let answer = await send();
  if (answer.status === 401 && (await renewToken(used))) answer = await send();
  if (answer.ok && answer.body !== null) return answer;
  const told = ((await answer.json().catch(() => null)) as Chunk | null)?.error;
  throw new ApiError(String(told?.code ?? "refused"), told?.message ?? `The node answered with status ${answer.status}.`, told?.hint ?? "", answer.status);
}

/** Ask, and tell the listener each piece as it comes. Aborting gives the figures so far; failures are thrown. */
export async function ask(body: ChatBody, signal: AbortSignal, listener: Listener): Promise<Figures> {
  const figures: Figures = { firstMs: null, tokensPerSecond: null, tokens: null, node: "", model: body.model, end: "finished" };
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
    const answer = await open(body, signal);
    figures.node = named(answer.headers.get("x-mesh-llm-node"));
    figures.model = named(answer.headers.get("x-mesh-llm-model")) || body.model;
    const read = eventReader();
    const reader = (answer.body as ReadableStream<Uint8Array>).pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array>).getReader();
    let ended = false;
    while (!ended) {
      const { done, value } = await reader.read();
      for (const data of read(done ? "\n\n" : value)) {
        if (data === "[DONE]") ended = true;
        else take(JSON.parse(data) as Chunk);
      }
      if (done && !ended) throw new ApiError("stream_broken", "The answer broke off before its end.", "Ask again: another node may answer.", 0);
    }
  } catch (failure) {
    if (!signal.aborted) throw failure instanceof TypeError ? new ApiError("unreachable", "The node does not answer.", "Ask again once the page is connected.", 0) : failure;
    figures.end = "stopped";
  }
  if (figures.tokens === null && pieces > 0) figures.tokens = pieces;
  if (figures.tokensPerSecond === null && pieces > 1 && last > first) figures.tokensPerSecond = ((pieces - 1) * 1000) / (last - first);
  return figures;
}
