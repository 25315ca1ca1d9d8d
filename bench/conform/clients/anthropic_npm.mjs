// Anthropic's library for JavaScript.
import Anthropic from "@anthropic-ai/sdk";
import { check, KEY, MODEL, runAll, TOOL_MODEL, TOOL_URL, URL } from "./cases.mjs";

const client = new Anthropic({ baseURL: URL, apiKey: KEY, maxRetries: 0 });
const toolClient = new Anthropic({ baseURL: TOOL_URL, apiKey: KEY, maxRetries: 0 });
const messages = [{ role: "user", content: "say something about the mesh" }];
const input_schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };

await runAll({
  messages: async () => {
    const told = await client.messages.create({ model: MODEL, max_tokens: 4, messages });
    check(told.stop_reason === "max_tokens", told.stop_reason);
  },
  "messages.stream": async () => {
    const stream = client.messages.stream({ model: MODEL, max_tokens: 4, messages });
    check((await stream.finalText()).length > 0, "no text");
  },
  "messages.stream, tools": async () => {
    const tools = [{ name: "weather", input_schema }];
    const final = await toolClient.messages.stream({ model: TOOL_MODEL, max_tokens: 9, messages, tools }).finalMessage();
    const block = final.content.at(-1);
    check(block.type === "tool_use" && block.input.city === "Rome", JSON.stringify(block));
  },
  "messages, stop_sequences": async () => {
    const told = await client.messages.create({ model: MODEL, max_tokens: 50, messages, stop_sequences: ["a"] });
    check(told.stop_reason === "stop_sequence", told.stop_reason);
  },
  "models.list": async () => {
    const listed = [];
    for await (const model of client.models.list()) listed.push(model.type);
    check(listed.includes("model"), JSON.stringify(listed));
  },
});
