import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vitest/config";

// A node whose console `npm run dev` talks to.
const node = process.env["MESH_LLM_CONSOLE"] ?? "http://localhost:3131";

export default defineConfig({
  plugins: [svelte()],
  base: "./",
  build: {
    outDir: "../src/mesh_llm/console/built",
    emptyOutDir: true,
    target: "es2022",
    // The page's policy allows no data: fonts and no inline styles; small files stay files.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    chunkSizeWarningLimit: 300,
  },
  // The node takes requests of its own page only: what comes through here is this page's, and says so.
  server: { proxy: Object.fromEntries(["/api", "/v1"].map((path) => [path, { target: node, changeOrigin: true, headers: { origin: node } }])) },
  test: { include: ["src/**/*.test.ts"], environment: "node" },
});
