// One answer from the server into a message of a conversation, and what was measured on the way.
//
// Invariant: whatever ends it, the message holds all text that had come, and says how it ended in `finish`.

import { streamChat } from "./api.js";

// Pieces that came all at once say nothing about speed.
const MIN_SECONDS = 0.02;

export class Run {
  /** `makeBody()` gives the request; `message` is the answer to fill; `onChange()` is called after each piece.
   * Until the first one `progress` is what the server says of the queue and of the prompt. */
  constructor(makeBody, message, onChange) {
    this.makeBody = makeBody;
    this.message = message;
    this.onChange = onChange;
    this.progress = null;
    this.controller = new AbortController();
  }

  stop() {
    this.controller.abort();
  }

  /** Run to the end. Returns null, or the Problem that ended it. */
  async answer() {
    const { message } = this;
    const meter = new Meter();
    let problem = null;
    try {
      for await (const part of streamChat(await this.makeBody(), this.controller.signal)) {
        if (part.progress) this.progress = part.progress;
        if (part.text) message.content += part.text;
        if (part.reasoning) message.reasoning = (message.reasoning ?? "") + part.reasoning;
        if (part.text || part.reasoning) meter.onPiece();
        if (part.finish) message.finish = part.finish;
        if (part.usage) meter.numTokens = part.usage.completion_tokens ?? null;
        message.stats = meter.stats();
        this.onChange();
      }
    } catch (error) {
      if (error.name === "AbortError") message.finish = "stopped";
      else if (error.kind) {
        message.finish = "cut";
        problem = error;
      } else throw error;
    }
    message.stats = meter.stats();
    return problem;
  }
}

/** Time to the first piece, and tokens per second after it. Without the server's count, pieces stand for tokens. */
class Meter {
  constructor() {
    this.startedAt = performance.now();
    this.firstAt = null;
    this.lastAt = null;
    this.numPieces = 0;
    this.numTokens = null;
  }

  onPiece() {
    this.lastAt = performance.now();
    this.firstAt ??= this.lastAt;
    this.numPieces++;
  }

  stats() {
    if (this.firstAt === null) return {};
    const numTokens = this.numTokens ?? this.numPieces;
    const seconds = (this.lastAt - this.firstAt) / 1_000;
    const stats = { firstMs: this.firstAt - this.startedAt, numTokens, exact: this.numTokens !== null };
    if (numTokens > 1 && seconds >= MIN_SECONDS) stats.rate = (numTokens - 1) / seconds;
    return stats;
  }
}
