// OpenAI's library for JavaScript.
import OpenAI from "openai";
import { check, KEY, MODEL, runAll, TOOL_MODEL, TOOL_URL, URL } from "./cases.mjs";

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: KEY, maxRetries: 0 });
const toolClient = new OpenAI({ baseURL: `${TOOL_URL}/v1`, apiKey: KEY, maxRetries: 0 });
const messages = [{ role: "user", content: "say something about the mesh" }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const schema = {
  type: "object",
  properties: { city: { enum: ["Rome", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};

await runAll({
  "chat.completions": async () => {
    const told = await client.chat.completions.create({ model: MODEL, messages, max_tokens: 4 });
    check(told.choices[0].message.refusal === null, "message.refusal is not null");
  },
  "chat.completions, stream": async () => {
    const runner = client.chat.completions.stream({ model: MODEL, messages, max_tokens: 4 });
    check((await runner.finalContent()).length > 0, "no text");
  },
  "chat.completions, tools": async () => {
    const tools = [{ type: "function", function: { name: "weather", parameters } }];
    const runner = toolClient.chat.completions.stream({ model: TOOL_MODEL, messages, tools, max_tokens: 9 });
    const told = await runner.finalMessage();
    check(told.tool_calls?.[0]?.function.name === "weather", "the tool was not called");
  },
  "responses.stream": async () => {
    const stream = client.responses.stream({ model: MODEL, input: "hello", stop: ["a"] });
    let text = "";
    for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
    const final = await stream.finalResponse();
    check(text.length > 0 && final.output_text === text, `${final.output_text} is not ${text}`);
  },
  "responses.stream, tools": async () => {
    const tools = [{ type: "function", name: "weather", parameters, strict: false }];
    const final = await toolClient.responses.stream({ model: TOOL_MODEL, input: "hello", tools }).finalResponse();
    check(final.output[0].type === "function_call", `output is ${final.output[0].type}`);
  },
  "responses, a format": async () => {
    const format = { type: "json_schema", name: "place", schema, strict: true };
    const told = await client.responses.create({
      model: MODEL, input: "a city", text: { format }, max_output_tokens: 400,
    });
    check(["Rome", "Oslo"].includes(JSON.parse(told.output_text).city), told.output_text);
  },
  "responses, previous_response_id": async () => {
    const first = await client.responses.create({ model: MODEL, input: "hello", max_output_tokens: 4 });
    const again = await client.responses.create({
      model: MODEL, input: "go on", previous_response_id: first.id, max_output_tokens: 4,
    });
    check(again.previous_response_id === first.id, "previous_response_id is not repeated");
  },
  embeddings: async () => {
    const told = await client.embeddings.create({ model: MODEL, input: ["a", "b"], dimensions: 4 });
    check(told.data.length === 2 && told.data[0].embedding.length === 4, `${told.data[0].embedding.length} numbers`);
  },
});
