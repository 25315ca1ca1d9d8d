// What an invite lets its holder do, from the least to the most. Each includes the ones before it.

export const SCOPES = [
  { scope: "client", title: "Only ask", text: "A laptop that uses the mesh's models." },
  { scope: "serve", title: "Ask and serve", text: "A machine that also answers with its own models." },
  { scope: "split", title: "Serve, and split models", text: "A trusted machine that also computes parts of models too big for one." },
] as const;

/** What the holder of an invite of this scope may do. */
export function scopeWords(scope: string): string {
  const words: Record<string, string> = {
    client: "that machine may send requests to models",
    serve: "that machine may send requests and answer them",
    split: "that machine may send requests, answer them, and lend memory to split models",
  };
  return words[scope] ?? "";
}
