import MarkdownIt from "markdown-it";
import { describe, expect, it } from "vitest";

import { mathAt, mathRule } from "./math-rule";

describe("mathAt", () => {
  it("finds all four ways to write a formula", () => {
    expect(mathAt("$x^2$ and", 0)).toEqual({ tex: "x^2", end: 5, block: false });
    expect(mathAt("\\(x\\)", 0)).toEqual({ tex: "x", end: 5, block: false });
    expect(mathAt("$$x$$", 0)).toEqual({ tex: "x", end: 5, block: true });
    expect(mathAt("\\[ x \\]", 0)).toEqual({ tex: "x", end: 7, block: true });
  });

  it("leaves prices, and what is not closed, alone", () => {
    for (const text of ["$5 and $6", "$ x$", "$x $", "$open", "$$", "\\(open", "$a$5"]) expect(mathAt(text, 0)).toBeNull();
  });
});

describe("mathRule", () => {
  const render = (text: string) => new MarkdownIt({ html: false }).use(mathRule).render(text).trim();

  it("keeps the TeX as escaped text for whoever draws it", () => {
    expect(render("so $a<b$ holds")).toBe('<p>so <span class="math">a&lt;b</span> holds</p>');
    expect(render("$$\n\\frac{1}{2}\n$$")).toBe('<span class="math block">\\frac{1}{2}</span>');
    expect(render("\\[\n- x\n\\]\n\nafter")).toBe('<span class="math block">- x</span><p>after</p>');
  });

  it("does not look into code", () => {
    expect(render("`$x$`")).toBe("<p><code>$x$</code></p>");
    expect(render("```\n$$x$$\n```")).toContain("$$x$$");
  });
});
