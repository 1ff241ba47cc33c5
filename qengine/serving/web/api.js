// The server's API, as this page uses it.
//
// Invariant: every failure is a Problem with a kind that the page has words for; the key is sent to this server alone
// and kept for this tab alone. Addresses are relative, so the page also works behind a proxy that adds a path.

const KEY_NAME = "qengine:key";
const TIMEOUT_MS = 10_000;

/** What went wrong: `kind` is down, key, busy, loading, too-long, cut, engine or refused. */
export class Problem extends Error {
  constructor(kind, message, retrySeconds = null) {
    super(message);
    this.kind = kind;
    this.retrySeconds = retrySeconds;
  }
}

export const apiKey = {
  get() {
    try {
      return sessionStorage.getItem(KEY_NAME) ?? "";
    } catch {
      return this.kept ?? "";
    }
  },
  set(key) {
    this.kept = key;
    try {
      if (key) sessionStorage.setItem(KEY_NAME, key);
      else sessionStorage.removeItem(KEY_NAME);
    } catch {
      // Without storage the key lives as long as the page.
    }
  },
};

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("down", "The server cannot be reached.");
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function problemOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // A proxy's own error page: the status has to do.
  }
  const message = typeof error.message === "string" ? error.message : `The server answered with ${response.status}.`;
  const retry = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  return new Problem(kindOf(response.status, error.code), message, Number.isFinite(retry) ? retry : null);
}

function kindOf(status, code) {
  if (code === "context_length_exceeded") return "too-long";
  if (status === 401) return "key";
  if (status === 429) return "busy";
  if (status === 503) return code === "loading" ? "loading" : "down";
  if (status >= 500) return "engine";
  return "refused";
}

/** The names of the model, each with its context in tokens. */
export async function listModels() {
  const response = await request("v1/models", { signal: AbortSignal.timeout(TIMEOUT_MS) }).catch(timeoutIsDown);
  return (await response.json()).data.map((model) => ({ name: model.id, contextLen: model.max_model_len ?? null }));
}

/** The text of /metrics, or null where the server has no such route. */
export async function readMetrics() {
  try {
    const response = await request("metrics", { signal: AbortSignal.timeout(TIMEOUT_MS) }).catch(timeoutIsDown);
    return await response.text();
  } catch (error) {
    if (error.kind === "refused") return null;
    throw error;
  }
}

function timeoutIsDown(error) {
  if (error.name === "AbortError" || error.name === "TimeoutError") {
    throw new Problem("down", "The server does not answer.");
  }
  throw error;
}

/**
 * Ask for an answer and yield what comes: {progress} until there is a token, then {text}, {reasoning}, {finish}, {usage}.
 * Throws a Problem, or an AbortError after `signal`.
 */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true, include_progress: true } }),
    signal,
  });
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new Problem("cut", "The server sent something that is not an answer.");
    }
    if (chunk.error) {
      throw new Problem("engine", String(chunk.error.message ?? "The answer failed."));
    }
    yield* partsOf(chunk);
  }
  // A whole stream ends with [DONE]; without it something between us and the model gave up.
  throw new Problem("cut", "The answer was cut off before its end.");
}

function* partsOf(chunk) {
  const choice = chunk.choices?.[0];
  const reasoning = choice?.delta?.reasoning_content ?? choice?.delta?.reasoning;
  if (reasoning) yield { reasoning: String(reasoning) };
  if (choice?.delta?.content) yield { text: String(choice.delta.content) };
  if (choice?.finish_reason) yield { finish: choice.finish_reason };
  if (chunk.usage) yield { usage: chunk.usage };
  if (chunk.progress) yield { progress: chunk.progress };
}

/** The data of each server-sent event. */
async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new Problem("cut", "The connection broke before the answer was complete.");
      });
      if (done) return;
      buffer += value.replaceAll("\r", "");
      const events = buffer.split("\n\n");
      buffer = events.pop();
      for (const event of events) {
        const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
        if (data.length) yield data.join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
