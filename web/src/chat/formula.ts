// Draws TeX as MathML, which browsers lay out themselves: no fonts and no inline styles. Loaded with the first formula.

import katex from "katex";

export function draw(element: HTMLElement): void {
  const tex = element.textContent;
  katex.render(tex, element, {
    displayMode: element.classList.contains("block"),
    output: "mathml",
    throwOnError: false,
    trust: false,
    strict: false,
    maxExpand: 200,
    maxSize: 20,
  });
}
