import { describe, expect, it } from "vitest";

import { eventReader, type ServerEvent } from "./sse";

describe("eventReader", () => {
  it("finds the same events however the text is cut", () => {
    const text = ': hello\r\ndata: {"a":\r\ndata: 1}\r\n\r\nid: r.1\nevent: x\ndata:two\n\ndata: [DONE]\n\nevent: none\n\n';
    for (let cut = 1; cut <= text.length; cut++) {
      const read = eventReader();
      const found: ServerEvent[] = [];
      for (let at = 0; at < text.length; at += cut) found.push(...read(text.slice(at, at + cut)));
      expect(found).toEqual([
        { event: "message", data: '{"a":\n1}', id: "" },
        { event: "x", data: "two", id: "r.1" },
        { event: "message", data: "[DONE]", id: "r.1" },
      ]);
    }
  });

  it("gives nothing of an event that did not end", () => {
    expect(eventReader()("data: half\n")).toEqual([]);
  });
});
