// Ollama's library for JavaScript.
import { Ollama } from "ollama";
import { check, MODEL, runAll, TOOL_MODEL, TOOL_URL, URL } from "./cases.mjs";

const client = new Ollama({ host: URL });
const toolClient = new Ollama({ host: TOOL_URL });
const messages = [{ role: "user", content: "say something about the mesh" }];
const options = { num_predict: 8 };
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "weather", description: "the weather", parameters } }];
const format = { type: "object", properties: { city: { enum: ["Rome", "Oslo"] } }, required: ["city"] };

async function all(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

await runAll({
  version: async () => {
    const told = await client.version();
    check(/^\d+\.\d+/.test(told.version), told.version);
  },
  list: async () => {
    const { models } = await client.list();
    check(
      models.some((model) => model.name === `${MODEL}:latest`),
      JSON.stringify(models.map((model) => model.name)),
    );
  },
  ps: async () => check((await client.ps()).models.length > 0, "no model"),
  show: async () => {
    const told = await client.show({ model: MODEL });
    check(told.capabilities.includes("completion"), JSON.stringify(told.capabilities));
  },
  chat: async () => {
    const told = await client.chat({ model: MODEL, messages, options });
    check(told.message.content && told.eval_count === 8 && told.done_reason === "length", JSON.stringify(told));
  },
  "chat, stream": async () => {
    const parts = await all(await client.chat({ model: MODEL, messages, options, stream: true }));
    check(parts.map((part) => part.message.content).join("").length > 0, "no text");
    check(parts.at(-1).done, "no end");
  },
  "chat, abort": async () => {
    const one = new Ollama({ host: URL });
    const stream = await one.chat({ model: MODEL, messages, stream: true });
    let error;
    try {
      for await (const _ of stream) one.abort();
    } catch (caught) {
      error = caught;
    }
    check(error?.name === "AbortError", `${error}`);
  },
  "chat, tools": async () => {
    const told = await toolClient.chat({ model: TOOL_MODEL, messages, tools });
    check(told.message.tool_calls?.[0]?.function.arguments.city === "Rome", JSON.stringify(told.message));
    const answer = { role: "tool", tool_name: "weather", content: "sunny" };
    const again = await toolClient.chat({ model: TOOL_MODEL, messages: [...messages, told.message, answer], tools });
    check(again.done, "no end");
  },
  "chat, format": async () => {
    const told = await client.chat({ model: MODEL, messages, format });
    check(["Rome", "Oslo"].includes(JSON.parse(told.message.content).city), told.message.content);
  },
  "generate, stream": async () => {
    const parts = await all(await client.generate({ model: MODEL, prompt: "the mesh", options, stream: true }));
    check(parts.map((part) => part.response).join("").length > 0, "no text");
  },
  embed: async () => {
    const told = await client.embed({ model: MODEL, input: ["a", "b"] });
    check(told.embeddings.length === 2, `${told.embeddings.length}`);
  },
  errors: async () => {
    let error;
    try {
      await client.chat({ model: "nosuch", messages });
    } catch (caught) {
      error = caught;
    }
    check(error?.status_code === 404, `${error}`);
  },
});
