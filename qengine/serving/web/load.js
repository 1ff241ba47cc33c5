// The strip at the top: what the server is doing, read from its Prometheus metrics.
//
// Invariant: it is shown only while figures come, and asks only while the page is visible. A rate is the difference of
// a counter over the time between two readings; a counter that went backwards means a restart, and counts as none.

import { readMetrics } from "./api.js";

const EVERY_MS = 2_000;
const NUM_SAMPLES = 60;
const PLOT = { width: 96, height: 26, padding: 2 };
const NAMES = {
  running: "num_requests_running",
  waiting: "num_requests_waiting",
  kvUse: "kv_cache_usage_perc",
  numTokens: "generation_tokens_total",
};

/** The figures of a /metrics text, summed over labels and under any prefix; null if one is missing. */
export function parseLoad(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    if (line.startsWith("#")) continue;
    const found = /^(?:\w+:)?(\w+)(?:\{.*\})?\s+(\S+)/.exec(line);
    if (found) sums.set(found[1], (sums.get(found[1]) ?? 0) + Number(found[2]));
  }
  const load = {};
  for (const [key, name] of Object.entries(NAMES)) {
    if (!Number.isFinite(sums.get(name))) return null;
    load[key] = sums.get(name);
  }
  return load;
}

/** The path of the samples, newest at the right: {line, area} for two <path> elements. */
export function plotPaths(samples) {
  const { width, height, padding } = PLOT;
  const top = Math.max(1, ...samples);
  const step = width / (NUM_SAMPLES - 1);
  const left = width - step * (samples.length - 1);
  const points = samples.map((value, index) => {
    const y = height - padding - (value / top) * (height - 2 * padding);
    return `${(left + index * step).toFixed(1)} ${y.toFixed(1)}`;
  });
  if (points.length < 2) return { line: "", area: "" };
  const line = `M${points.join("L")}`;
  return { line, area: `${line}L${width} ${height}L${left.toFixed(1)} ${height}Z` };
}

export class LoadStrip {
  constructor(root) {
    this.root = root;
    this.samples = [];
    this.last = null;
    this.timer = null;
    document.addEventListener("visibilitychange", () => this.start());
  }

  /** Begin, or begin again after the key has changed. */
  start() {
    clearTimeout(this.timer);
    if (!document.hidden) this.poll();
  }

  async poll() {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    let load = null;
    let exists = true;
    try {
      const text = await readMetrics();
      exists = text !== null;
      load = text === null ? null : parseLoad(text);
    } catch {
      // The server is away, or wants a key: the page says so elsewhere.
    }
    if (turn !== this.turn) return;
    if (load) this.show(load);
    else this.root.hidden = true;
    // A server without metrics will not grow them: there is nothing to come back for.
    if (exists && !document.hidden) this.timer = setTimeout(() => this.poll(), EVERY_MS);
  }

  show(load) {
    const now = performance.now();
    const seconds = this.last ? (now - this.last.at) / 1000 : 0;
    const rate = seconds > 0 ? Math.max(0, load.numTokens - this.last.numTokens) / seconds : 0;
    this.last = { at: now, numTokens: load.numTokens };
    this.samples.push(rate);
    this.samples.splice(0, this.samples.length - NUM_SAMPLES);
    const set = (id, text) => {
      this.root.querySelector(id).textContent = text;
    };
    set("#strip-running", String(load.running));
    set("#strip-waiting", String(load.waiting));
    set("#strip-kv", `${(load.kvUse * 100).toFixed(load.kvUse < 0.1 ? 1 : 0)} %`);
    set("#strip-rate", rate < 10 ? rate.toFixed(1).replace(/\.0$/, "") : rate.toFixed(0));
    const { line, area } = plotPaths(this.samples);
    this.root.querySelector("#strip-plot .line").setAttribute("d", line);
    this.root.querySelector("#strip-plot .area").setAttribute("d", area);
    this.root.hidden = false;
  }
}
