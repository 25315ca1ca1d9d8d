// Markdown to markup that is safe to show. What a model writes is hostile: it may repeat any page or file it was given.
//
// Three walls: HTML in the text is shown as text; what Markdown makes of it goes through DOMPurify; and the page's
// policy lets nothing but the page's own files and local images load.

import DOMPurify from "dompurify";
import MarkdownIt from "markdown-it";

import { mathRule } from "./math-rule";

const ADDRESS = /^(?:https?|mailto):/i;
const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s",
    "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["class", "href", "rel", "start", "target", "title"],
  ALLOWED_URI_REGEXP: ADDRESS,
  // Attributes that hold no address: without this their values would have to look like one.
  ADD_URI_SAFE_ATTR: ["rel", "start", "target"],
};
const KEPT = 400;

const markdown = new MarkdownIt({ html: false, linkify: true, breaks: false, typographer: false });
markdown.validateLink = (address) => ADDRESS.test(address.trim());
markdown.use(mathRule);
// Headings of an answer lie below the page's own.
markdown.core.ruler.push("lower_headings", (state) => {
  for (const token of state.tokens) {
    if (/^h[1-6]$/.test(token.tag)) token.tag = `h${Math.min(6, Number(token.tag[1]) + 2)}`;
  }
});
markdown.renderer.rules["link_open"] = (tokens, index, options, _env, renderer) => {
  tokens[index]?.attrSet("target", "_blank");
  tokens[index]?.attrSet("rel", "noopener noreferrer nofollow");
  return renderer.renderToken(tokens, index, options);
};
// An image would be a request to its host: show what it is instead.
markdown.renderer.rules["image"] = (tokens, index) => {
  const escape = markdown.utils.escapeHtml;
  const token = tokens[index];
  return `<span class="image">[image: ${escape(token?.content || String(token?.attrGet("src") ?? ""))}]</span>`;
};

const cache = new Map<string, string>();

function clean(markup: string): string {
  const known = cache.get(markup);
  if (known !== undefined) return known;
  if (cache.size >= KEPT) cache.clear();
  const safe = DOMPurify.sanitize(markup, ALLOWED);
  cache.set(markup, safe);
  return safe;
}

/** The parts of a text that stand below each other, each as safe markup: only those that change need drawing again. */
export function blocks(text: string): string[] {
  const env = {};
  const tokens = markdown.parse(text, env);
  const found: string[] = [];
  let begin = 0;
  let depth = 0;
  tokens.forEach((token, index) => {
    depth += token.nesting;
    if (depth > 0) return;
    found.push(clean(markdown.renderer.render(tokens.slice(begin, index + 1), markdown.options, env)));
    begin = index + 1;
  });
  return found;
}
