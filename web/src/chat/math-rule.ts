// Maths in Markdown: $…$, $$…$$, \(…\) and \[…\], as elements that hold the TeX as text until it is drawn.

import type { MarkdownIt } from "markdown-it";

interface Marks {
  open: string;
  close: string;
  block: boolean;
}

const MARKS: Marks[] = [
  { open: "$$", close: "$$", block: true },
  { open: "\\[", close: "\\]", block: true },
  { open: "\\(", close: "\\)", block: false },
  { open: "$", close: "$", block: false },
];

/** Where the TeX that begins at `start` ends and what it is, or null: "$5 and $6" are no maths. */
export function mathAt(text: string, start: number): { tex: string; end: number; block: boolean } | null {
  const marks = MARKS.find(({ open }) => text.startsWith(open, start));
  if (marks === undefined) return null;
  const from = start + marks.open.length;
  const to = text.indexOf(marks.close, from);
  if (to <= from) return null;
  const tex = text.slice(from, to);
  const end = to + marks.close.length;
  if (marks.open === "$" && (/^\s|\s$|\n\n/.test(tex) || /^\d/.test(text.slice(end)) || text[end - 2] === "\\")) return null;
  if (tex.trim() === "") return null;
  return { tex: tex.trim(), end, block: marks.block };
}

export function mathRule(markdown: MarkdownIt): void {
  const draw = (tex: string, block: boolean) =>
    `<span class="math${block ? " block" : ""}">${markdown.utils.escapeHtml(tex)}</span>`;

  markdown.inline.ruler.before("escape", "math", (state, silent) => {
    const found = mathAt(state.src, state.pos);
    if (found === null || found.end > state.posMax) return false;
    if (!silent) {
      const token = state.push("math", "", 0);
      token.content = found.tex;
      token.meta = { block: found.block };
    }
    state.pos = found.end;
    return true;
  });

  // A formula of its own may have lines that look like a list or a heading.
  markdown.block.ruler.before("fence", "math", (state, startLine, endLine, silent) => {
    const begin = (state.bMarks[startLine] ?? 0) + (state.tShift[startLine] ?? 0);
    const found = mathAt(state.src, begin);
    if (found?.block !== true) return false;
    let line = startLine;
    while (line < endLine && (state.eMarks[line] ?? 0) < found.end) line++;
    if (line >= endLine || state.src.slice(found.end, state.eMarks[line]).trim() !== "") return false;
    if (silent) return true;
    const token = state.push("math", "", 0);
    token.content = found.tex;
    token.meta = { block: true };
    state.line = line + 1;
    return true;
  });

  markdown.renderer.rules["math"] = (tokens, index) => {
    const token = tokens[index];
    return token === undefined ? "" : draw(token.content, (token.meta as { block: boolean }).block);
  };
}
