// Conversations in the browser's own database: they never leave this machine.

import type { Conversation } from "./conversation";

const NAME = "mesh-llm";
const STORE = "conversations";

function open(): Promise<IDBDatabase> {
  return new Promise((resolve, reject) => {
    const asked = indexedDB.open(NAME, 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore(STORE, { keyPath: "id" });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error ?? new Error("The browser keeps no data for this page."));
  });
}

async function run<T>(mode: IDBTransactionMode, work: (store: IDBObjectStore) => IDBRequest<T>): Promise<T> {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode);
      const asked = work(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(asked.result);
      transaction.onabort = transaction.onerror = () => reject(transaction.error ?? new Error("The browser did not keep the conversation."));
    });
  } finally {
    database.close();
  }
}

/** All that are kept, the latest first. */
export async function all(): Promise<Conversation[]> {
  const found = (await run("readonly", (store) => store.getAll())) as Conversation[];
  return found.sort((one, other) => other.changed - one.changed);
}

export async function keep(conversation: Conversation): Promise<void> {
  await run("readwrite", (store) => store.put(conversation));
}

export async function forget(id: string): Promise<void> {
  await run("readwrite", (store) => store.delete(id));
}
