// Talking to the server. The key lives in this tab's session only, and goes nowhere but into the Authorization header.

const KEY = "quire.key";
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (options.json !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, {
    method: options.json === undefined ? "GET" : "POST",
    body: options.json === undefined ? undefined : JSON.stringify(options.json),
    headers, signal: options.signal, cache: "no-store",
  });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new Refused(answer.status, told.error?.message ?? told.detail ?? `the server answered ${answer.status}`);
}

// The data of each server-sent event. A fetch, not an EventSource, which could not carry the key.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
