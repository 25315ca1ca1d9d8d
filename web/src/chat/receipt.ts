// The receipt of an answer: which nodes saw the prompt, and whether what they signed belongs together.

/** One node that saw the prompt. `firstOnly`: it signed that it took the prompt, and not how its answer ended. */
export interface Seen {
  node: string;
  part: string;
  signed: boolean;
  /** Absent in receipts that were kept by an earlier version of this page. */
  firstOnly?: boolean;
}

export interface Receipt {
  id: string;
  holds: boolean;
  model: string;
  quantisation: string;
  seen: Seen[];
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
  seen: { node: string; part: string; signed: boolean; first_only?: boolean }[];
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
  const seen = answer.seen.map(({ node, part, signed, first_only }) => ({
    node,
    part,
    signed,
    firstOnly: first_only ?? false,
  }));
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

/** What it signed of that, in words to follow its part. */
export function signedOf(one: Seen): string {
  if (!one.signed) return "signed nothing";
  return one.firstOnly ? "signed that it took the prompt, not how its answer ended" : "signed it";
}
