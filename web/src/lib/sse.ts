// Server-sent events out of text that arrives in pieces of any size (HTML standard, section 9.2.6).

/** `id`: the last one that the stream gave, also where this event has none of its own. */
export interface ServerEvent {
  event: string;
  data: string;
  id: string;
}

/** Returns the events that have become whole with each piece; keep one for one stream. */
export function eventReader(): (piece: string) => ServerEvent[] {
  let rest = "";
  let data: string[] = [];
  let event = "";
  let id = "";
  return (piece) => {
    const whole: ServerEvent[] = [];
    rest += piece;
    // A carriage return at the end may be half of a line break.
    const usable = rest.endsWith("\r") ? rest.length - 1 : rest.length;
    const lines = rest.slice(0, usable).split(/\r\n|\n|\r/);
    rest = (lines.pop() ?? "") + rest.slice(usable);
    for (const line of lines) {
      if (line === "") {
        if (data.length > 0) whole.push({ event: event || "message", data: data.join("\n"), id });
        data = [];
        event = "";
        continue;
      }
      const colon = line.indexOf(":");
      const name = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
      if (name === "data") data.push(value);
      else if (name === "event") event = value;
      else if (name === "id") id = value;
    }
    return whole;
  };
}

/** The events of an answer's body, as they come; ends with it. */
export async function* eventsOf(answer: Response): AsyncGenerator<ServerEvent> {
  if (answer.body === null) return;
  const read = eventReader();
  const reader = answer.body.pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array>).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      yield* read(done ? "\n\n" : value);
      if (done) return;
    }
  } finally {
    // Whoever stops reading ends the request.
    void reader.cancel().catch(() => undefined);
  }
}
