// Vercel's `ai` with its provider for OpenAI.
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, jsonSchema, streamText, tool } from "ai";
import { check, KEY, MODEL, runAll, TOOL_MODEL, TOOL_URL, URL } from "./cases.mjs";

const openai = createOpenAI({ baseURL: `${URL}/v1`, apiKey: KEY });
const toolOpenai = createOpenAI({ baseURL: `${TOOL_URL}/v1`, apiKey: KEY });
const prompt = "say something about the mesh";
const tools = {
  weather: tool({
    inputSchema: jsonSchema({ type: "object", properties: { city: { type: "string" } }, required: ["city"] }),
  }),
};
const given = { prompt, maxRetries: 0 };

async function streamed(model) {
  const told = streamText({ ...given, model, maxOutputTokens: 4, onError: () => {} });
  let text = "";
  for await (const part of told.fullStream) {
    if (part.type === "error") throw part.error;
    if (part.type === "text-delta") text += part.text;
  }
  check(text.length > 0, "no text");
}

await runAll({
  "generateText, chat": async () => {
    const told = await generateText({ ...given, model: openai.chat(MODEL), maxOutputTokens: 4 });
    check(told.finishReason === "length", told.finishReason);
  },
  "streamText, chat": async () => streamed(openai.chat(MODEL)),
  "generateText, responses": async () => {
    const told = await generateText({ ...given, model: openai.responses(MODEL), maxOutputTokens: 16 });
    check(told.finishReason === "length", told.finishReason);
  },
  "streamText, responses": async () => streamed(openai.responses(MODEL)),
  "tools, responses": async () => {
    const told = await generateText({ ...given, model: toolOpenai.responses(TOOL_MODEL), tools });
    check(told.toolCalls[0]?.toolName === "weather", "the tool was not called");
  },
});
