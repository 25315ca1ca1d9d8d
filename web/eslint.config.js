import js from "@eslint/js";
import svelte from "eslint-plugin-svelte";
import globals from "globals";
import ts from "typescript-eslint";

import svelteConfig from "./svelte.config.js";

export default ts.config(
  { ignores: ["node_modules/", "dist/"] },
  js.configs.recommended,
  ...ts.configs.strict,
  ...ts.configs.stylistic,
  ...svelte.configs.recommended,
  {
    languageOptions: { globals: globals.browser },
    rules: {
      // The one place where a string becomes markup says so, and why it is safe.
      "svelte/no-at-html-tags": "error",
      "no-eval": "error",
      "no-restricted-globals": ["error", { name: "fetch", message: "Use lib/api.ts or chat/ask.ts: they know the node's errors." }],
      eqeqeq: "error",
    },
  },
  {
    files: ["**/*.svelte", "**/*.svelte.ts"],
    languageOptions: { parserOptions: { parser: ts.parser, extraFileExtensions: [".svelte"], svelteConfig } },
  },
  { files: ["vite.config.ts", "eslint.config.js", "svelte.config.js"], languageOptions: { globals: globals.node } },
);
