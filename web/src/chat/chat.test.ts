import { describe, expect, it } from "vitest";

import { newConversation, requestBody, titleOf, withoutThoughts, type Message } from "./conversation";

describe("withoutThoughts", () => {
  it("splits thoughts off, also while they are being written", () => {
    expect(withoutThoughts("plain <think>")).toEqual({ thoughts: "", answer: "plain <think>" });
    expect(withoutThoughts("<think>hm")).toEqual({ thoughts: "hm", answer: "" });
    expect(withoutThoughts("<think>hm</think>\n\nYes.")).toEqual({ thoughts: "hm", answer: "Yes." });
  });
});

describe("requestBody", () => {
  const message = (role: Message["role"], text: string, images: string[] = []): Message => ({ id: text, role, text, reasoning: "secret", images, figures: null, failure: null });

  it("sends the system prompt, the settings that were chosen and no thoughts", () => {
    const conversation = newConversation("c", "tiny", 0);
    conversation.system = "Be brief.";
    conversation.sampling.temperature = 0;
    conversation.messages = [message("user", "hi"), message("assistant", "<think>hm</think>Hello."), message("user", "look", ["data:image/png;base64,AA"]), message("assistant", "")];
    const body = requestBody(conversation, "tiny");
    expect(body.messages).toEqual([
      { role: "system", content: "Be brief." },
      { role: "user", content: "hi" },
      { role: "assistant", content: "Hello." },
      { role: "user", content: [{ type: "image_url", image_url: { url: "data:image/png;base64,AA" } }, { type: "text", text: "look" }] },
    ]);
    expect(body["temperature"]).toBe(0);
    expect(body).not.toHaveProperty("top_p");
    expect(JSON.stringify(body)).not.toContain("secret");
  });
});

describe("titleOf", () => {
  it("takes the first line, and cuts it between characters", () => {
    expect(titleOf("  one\ntwo")).toBe("one");
    expect([...titleOf("🙂".repeat(80))]).toHaveLength(60);
  });
});
