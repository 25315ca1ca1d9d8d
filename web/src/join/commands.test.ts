import { execFileSync } from "node:child_process";

import { describe, expect, it } from "vitest";

import { commands, shellWord } from "./commands";

const HOSTILE = ["tiny", "it's", '"; touch /tmp/x; "', "$(id) `id`", "a b\nc", "<script>alert(1)</script>", "--flag", "\\", "ünï 🙂"];

describe("shellWord", () => {
  it("is one word to a real shell, and the same one", () => {
    for (const word of HOSTILE) {
      expect(execFileSync("/bin/sh", ["-c", `printf '%s' ${shellWord(word)}`]).toString()).toBe(word);
    }
  });
});

describe("commands", () => {
  it("names the address and the model in each", () => {
    for (const command of commands("http://localhost:9337/v1", "tiny")) {
      expect(command.text).toContain("localhost:9337");
      if (command.id !== "open-webui") expect(command.text).toContain("tiny");
    }
  });

  it("has a place for the API key in each, where requests need one", () => {
    for (const command of commands("http://localhost:9337/v1", "tiny", 0, "KEY")) {
      expect(command.text).toMatch(/\bKEY\b/);
      expect(command.text).not.toMatch(/\bnone\b/);
    }
    const curl = commands("http://localhost:9337/v1", "tiny").find((each) => each.id === "curl");
    expect(curl?.text).not.toContain("authorization");
  });

  it("hands curl the body that was meant, whatever the model is called", () => {
    for (const model of HOSTILE) {
      const curl = commands("http://localhost:1/v1", model).find((each) => each.id === "curl");
      const printed = execFileSync("/bin/sh", ["-c", (curl?.text ?? "").replace(/^curl/, "printf '%s\\0'")]).toString();
      const body: unknown = JSON.parse(printed.split("\0")[4] ?? "");
      expect(body).toEqual({ model, messages: [{ role: "user", content: "Hello" }] });
    }
  });
});
