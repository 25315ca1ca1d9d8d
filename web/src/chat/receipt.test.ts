import { describe, expect, it } from "vitest";

import { partOf, receiptFrom, signedOf, summaryOf } from "./receipt";

const ANSWER = {
  id: "0".repeat(32),
  holds: true,
  model: "tiny",
  quantisation: "Q8_0",
  seen: [
    { node: "a", name: "desk", part: "asked", signed: true },
    { node: "b", name: "gpu", part: "host", signed: true },
  ],
  findings: [
    { mark: "holds" as const, text: "It follows." },
    { mark: "note" as const, text: "Not read yet." },
  ],
  receipt: "receipt1.AA",
};

describe("a receipt", () => {
  it("says in one line who saw the prompt", () => {
    const receipt = receiptFrom(ANSWER);
    expect(summaryOf(receipt, (node) => `node ${node}`)).toBe("verified · seen by node a, node b");
    expect(summaryOf({ ...receipt, holds: false }, (node) => node)).toBe("not verified · seen by a, b");
  });

  it("keeps what is to be known, and no names, which may change", () => {
    const receipt = receiptFrom(ANSWER);
    expect(receipt.remarks).toEqual(["Not read yet."]);
    expect(receipt.text).toBe("receipt1.AA");
    expect(JSON.stringify(receipt)).not.toContain("desk");
  });

  it("says of a host that was killed what it signed, and what not", () => {
    const lost = { node: "c", name: "gone", part: "lost", signed: true, first_only: true };
    const [asked, , killed] = receiptFrom({ ...ANSWER, seen: [...ANSWER.seen, lost] }).seen;
    expect(killed && signedOf(killed)).toBe("signed that it took the prompt, not how its answer ended");
    expect(asked && signedOf(asked)).toBe("signed it");
    expect(signedOf({ node: "w", part: "worker", signed: false })).toBe("signed nothing");
  });

  it("shows a part that it does not know as it is", () => {
    expect(partOf("host")).toBe("answered");
    expect(partOf("else")).toBe("else");
  });
});
