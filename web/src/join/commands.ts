// Ready-to-paste ways to ask this node, with the right address and model filled in.

export interface Command {
  id: string;
  title: string;
  text: string;
  note: string;
}

/** One word of a POSIX shell, whatever is in it: a model's name is another machine's word. */
export function shellWord(text: string): string {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}

/** A string of Python, JavaScript or JSON. */
function quoted(text: string): string {
  return JSON.stringify(text);
}

/**
 * `api` is the OpenAI base address, ending in /v1; `context` is the model's, 0 where it is not known; `key` is a word
 * for the API key, `none` where requests need none.
 */
export function commands(api: string, model: string, context = 0, key = "none"): Command[] {
  const header = key === "none" ? "" : ` \\\n  -H 'authorization: Bearer ${key}'`;
  const root = api.replace(/\/v1\/?$/, "");
  const word = shellWord(model);
  const body = JSON.stringify({ model, messages: [{ role: "user", content: "Hello" }] });
  const openCode = {
    model: `mesh-llm/${model}`,
    provider: { "mesh-llm": { npm: "@ai-sdk/openai-compatible", options: { baseURL: api, apiKey: key }, models: { [model]: {} } } },
  };
  const pi = {
    name: "mesh-llm",
    baseUrl: api,
    apiKey: key,
    api: "openai-completions",
    models: [
      {
        id: model,
        name: model,
        reasoning: false,
        input: ["text"],
        cost: { input: 0, output: 0, cacheRead: 0, cacheWrite: 0 },
        contextWindow: context || 32_768,
        maxTokens: Math.max(1, Math.floor((context || 32_768) / 2)),
      },
    ],
  };
  const byHand = (agent: string, text: string) => `mesh-llm run -m ${word} ${agent}\n\n# the same by hand:\n${text}`;
  return [
    {
      id: "curl",
      title: "curl",
      text: `curl ${api}/chat/completions \\\n  -H 'content-type: application/json'${header} \\\n  -d ${shellWord(body)}`,
      note: "Add \"stream\": true to see the answer as it is written.",
    },
    {
      id: "python",
      title: "Python",
      text: `from openai import OpenAI\n\nclient = OpenAI(base_url=${quoted(api)}, api_key=${quoted(key)})\nanswer = client.chat.completions.create(\n    model=${quoted(model)},\n    messages=[{"role": "user", "content": "Hello"}],\n)\nprint(answer.choices[0].message.content)`,
      note: "pip install openai",
    },
    {
      id: "javascript",
      title: "JavaScript",
      text: `import OpenAI from "openai";\n\nconst client = new OpenAI({ baseURL: ${quoted(api)}, apiKey: ${quoted(key)} });\nconst answer = await client.chat.completions.create({\n  model: ${quoted(model)},\n  messages: [{ role: "user", content: "Hello" }],\n});\nconsole.log(answer.choices[0].message.content);`,
      note: "npm install openai",
    },
    {
      id: "goose",
      title: "goose",
      text: byHand("goose", `GOOSE_PROVIDER=openai OPENAI_HOST=${root} OPENAI_BASE_PATH=v1/chat/completions \\\n  OPENAI_API_KEY=${key} GOOSE_MODEL=${word} goose session`),
      note: "Nothing is written into goose's own settings.",
    },
    {
      id: "pi",
      title: "pi",
      text: byHand(
        "pi",
        `printf '%s\\n' ${shellWord(`export default (pi) => pi.registerProvider("mesh-llm", ${JSON.stringify(pi)});`)} > mesh-llm.ts\npi --extension ./mesh-llm.ts --provider mesh-llm --model ${word}`,
      ),
      note: "Nothing is written into pi's own settings.",
    },
    {
      id: "opencode",
      title: "OpenCode",
      text: byHand("opencode", `OPENCODE_CONFIG_CONTENT=${shellWord(JSON.stringify(openCode))} opencode`),
      note: "Nothing is written into OpenCode's own settings.",
    },
    {
      id: "claude",
      title: "Claude Code",
      text: byHand(
        "claude",
        `ANTHROPIC_BASE_URL=${root} ANTHROPIC_AUTH_TOKEN=${key} ANTHROPIC_API_KEY= \\\n  ANTHROPIC_MODEL=${word} ANTHROPIC_DEFAULT_HAIKU_MODEL=${word} claude`,
      ),
      note: "Wants a model with a long context that can use tools.",
    },
    {
      id: "aider",
      title: "aider",
      text: byHand("aider", `OPENAI_API_BASE=${api} OPENAI_API_KEY=${key} \\\n  aider --model ${shellWord(`openai/${model}`)}`),
      note: "",
    },
    {
      id: "open-webui",
      title: "Open WebUI",
      text: `OPENAI_API_BASE_URL=${api} OPENAI_API_KEY=${key} \\\n  open-webui serve --port 8080`,
      note: "All models of the mesh are offered there.",
    },
  ];
}
