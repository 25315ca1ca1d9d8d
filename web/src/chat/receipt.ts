// The receipt of an answer: which nodes saw the prompt, and whether what they signed belongs together.

export interface Receipt {
  id: string;
  holds: boolean;
  model: string;
  quantisation: string;
  seen: { node: string; part: string; signed: boolean }[];
  /** What does not hold, and what is to be known. */
  remarks: string[];
  /** For `mesh-llm receipt verify`. */
  text: string;
}

export interface ReceiptAnswer {
  id: string;
  holds: boolean;
  model: string;
  quantisation: string;
  seen: { node: string; part: string; signed: boolean }[];
  findings: { mark: "holds" | "fails" | "note"; text: string }[];
  receipt: string;
}

const PARTS: Record<string, string> = {
  asked: "was asked",
  host: "answered",
  worker: "computed layers",
  refused: "did not take it",
  lost: "was lost in the middle",
};

export function receiptFrom(answer: ReceiptAnswer): Receipt {
  const { id, holds, model, quantisation, receipt } = answer;
  const seen = answer.seen.map(({ node, part, signed }) => ({ node, part, signed }));
  const remarks = answer.findings.filter(({ mark }) => mark !== "holds").map(({ text }) => text);
  return { id, holds, model, quantisation, seen, remarks, text: receipt };
}

/** One line: `verified · seen by desk, gpu-box`. */
export function summaryOf(receipt: Receipt, nameOf: (node: string) => string): string {
  return `${receipt.holds ? "verified" : "not verified"} · seen by ${receipt.seen.map(({ node }) => nameOf(node)).join(", ")}`;
}

/** What a node did with the prompt, in words. */
export function partOf(part: string): string {
  return PARTS[part] ?? part;
}
