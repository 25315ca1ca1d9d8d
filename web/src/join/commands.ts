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

/** `api` is the OpenAI base address, ending in /v1. */
export function commands(api: string, model: string): Command[] {
  const root = api.replace(/\/v1\/?$/, "");
  const word = shellWord(model);
  const body = JSON.stringify({ model, messages: [{ role: "user", content: "Hello" }] });
  const openCode = {
    model: `mesh-llm/${model}`,
    provider: { "mesh-llm": { npm: "@ai-sdk/openai-compatible", options: { baseURL: api, apiKey: "none" }, models: { [model]: {} } } },
  };
  const pi = { providers: { "mesh-llm": { baseUrl: api, api: "openai-completions", apiKey: "none", models: [{ id: model }] } } };
  return [
    {
      id: "curl",
      title: "curl",
      text: `curl ${api}/chat/completions \\\n  -H 'content-type: application/json' \\\n  -d ${shellWord(body)}`,
      note: "Add \"stream\": true to see the answer as it is written.",
    },
    {
      id: "python",
      title: "Python",
      text: `from openai import OpenAI\n\nclient = OpenAI(base_url=${quoted(api)}, api_key="none")\nanswer = client.chat.completions.create(\n    model=${quoted(model)},\n    messages=[{"role": "user", "content": "Hello"}],\n)\nprint(answer.choices[0].message.content)`,
      note: "pip install openai",
    },
    {
      id: "javascript",
      title: "JavaScript",
      text: `import OpenAI from "openai";\n\nconst client = new OpenAI({ baseURL: ${quoted(api)}, apiKey: "none" });\nconst answer = await client.chat.completions.create({\n  model: ${quoted(model)},\n  messages: [{ role: "user", content: "Hello" }],\n});\nconsole.log(answer.choices[0].message.content);`,
      note: "npm install openai",
    },
    {
      id: "goose",
      title: "goose",
      text: `GOOSE_PROVIDER=openai OPENAI_HOST=${root} OPENAI_API_KEY=none \\\n  GOOSE_MODEL=${word} goose session`,
      note: "Nothing is written into goose's own settings.",
    },
    {
      id: "pi",
      title: "pi",
      text: `mkdir -p ~/.pi/mesh-llm\ncat > ~/.pi/mesh-llm/models.json <<'END'\n${JSON.stringify(pi, null, 2)}\nEND\nPI_CODING_AGENT_DIR=~/.pi/mesh-llm pi --provider mesh-llm --model ${word}`,
      note: "A directory of its own: pi's usual settings stay as they are.",
    },
    {
      id: "opencode",
      title: "OpenCode",
      text: `OPENCODE_CONFIG_CONTENT=${shellWord(JSON.stringify(openCode))} opencode`,
      note: "Nothing is written into OpenCode's own settings.",
    },
    {
      id: "claude",
      title: "Claude Code",
      text: `ANTHROPIC_BASE_URL=${root} ANTHROPIC_AUTH_TOKEN=none \\\n  ANTHROPIC_MODEL=${word} ANTHROPIC_SMALL_FAST_MODEL=${word} claude`,
      note: "Wants a model with a long context that can use tools.",
    },
    {
      id: "aider",
      title: "aider",
      text: `OPENAI_API_BASE=${api} OPENAI_API_KEY=none \\\n  aider --model ${shellWord(`openai/${model}`)}`,
      note: "",
    },
    {
      id: "open-webui",
      title: "Open WebUI",
      text: `OPENAI_API_BASE_URL=${api} OPENAI_API_KEY=none \\\n  open-webui serve --port 8080`,
      note: "All models of the mesh are offered there.",
    },
  ];
}
