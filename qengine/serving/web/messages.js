// How one message looks: its text, what was measured, and what can be done with it.
//
// Invariant: it only draws. What a button does is the caller's business, and it never changes a message.

import { pieces } from "./highlight.js";
import { element, renderMarkdown } from "./markdown.js";

const SVG = "http://www.w3.org/2000/svg";
const ORDINALS = new Intl.PluralRules("en", { type: "ordinal" });

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onClick) {
  const button = element("button", { type: "button", class: "icon-button small", "aria-label": label, title: label }, icon(name));
  button.addEventListener("click", () => onClick(button));
  return button;
}

export function textButton(label, onClick, kind = "button") {
  const button = element("button", { type: "button", class: kind }, label);
  button.addEventListener("click", onClick);
  return button;
}

/** Copy `text`, and show on `button` that it was done. */
export async function copyFrom(button, text) {
  const use = button.querySelector("use");
  const label = button.getAttribute("aria-label");
  const done = await copy(text);
  use.setAttribute("href", done ? "#i-check" : "#i-close");
  button.setAttribute("aria-label", done ? "Copied" : "Copying is not allowed here");
  setTimeout(() => {
    use.setAttribute("href", "#i-copy");
    button.setAttribute("aria-label", label);
  }, 1_500);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Plain HTTP on another machine has no clipboard; the older way still works there.
    const area = element("textarea", { class: "sr-only", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

function codeBlock(code, language) {
  const button = iconButton("copy", "Copy the code", () => copyFrom(button, code));
  const content = element("code");
  for (const [kind, text] of pieces(code, language)) {
    content.append(kind ? element("span", { class: `c-${kind}` }, text) : text);
  }
  return element(
    "div",
    { class: "code" },
    element("div", { class: "code-top" }, element("span", {}, language || "text"), button),
    element("pre", { tabindex: "0", "aria-label": language ? `Code in ${language}` : "Code" }, content),
  );
}

/** What `stats` says in words, as a list of short texts. */
export function statsText(message) {
  const { stats = {}, finish } = message;
  const texts = [];
  if (stats.rate > 0) texts.push(`${stats.exact ? "" : "≈ "}${stats.rate.toFixed(stats.rate < 10 ? 2 : 1)} tok/s`);
  if (stats.firstMs > 0) texts.push(`${seconds(stats.firstMs)} to first token`);
  if (stats.numTokens > 0) texts.push(`${stats.exact ? "" : "≈ "}${stats.numTokens} ${stats.numTokens === 1 ? "token" : "tokens"}`);
  if (finish === "stopped") texts.push("stopped by you");
  if (finish === "length") texts.push("cut at the limit of tokens");
  if (finish === "cut") texts.push("incomplete");
  return texts;
}

function seconds(milliseconds) {
  return milliseconds < 1_000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1_000).toFixed(2)} s`;
}

/** What the server does before the first token, in words; empty where it said nothing. */
export function progressText(progress) {
  if (!progress) return "";
  const { queue_position: position, prompt_tokens: total, computed_tokens: computed } = progress;
  if (position === 1) return "Waiting, next in line";
  if (position > 1) return `Waiting, ${ordinal(position)} in line`;
  return total > 0 ? `Reading the prompt, ${Math.floor((100 * computed) / total)} %` : "";
}

function ordinal(number) {
  const ending = { one: "st", two: "nd", few: "rd", other: "th" }[ORDINALS.select(number)];
  return `${number}${ending}`;
}

/** An answer: `update(message, run)` draws what has changed since; `run` is null once it has ended. */
export class AnswerView {
  constructor(actions) {
    this.thinking = element("details", { class: "thinking" }, element("summary", {}, "Thinking"), element("div", { class: "thoughts" }));
    this.thinking.hidden = true;
    this.text = element("div", { class: "prose" });
    this.state = element("p", { class: "state" });
    this.stats = element("p", { class: "stats" });
    this.copyButton = iconButton("copy", "Copy the answer", actions.copy);
    this.againButton = iconButton("again", "Answer again", actions.again);
    this.bottom = element("div", { class: "bottom" }, this.stats, element("div", { class: "actions" }, this.copyButton, this.againButton));
    this.root = element("article", { class: "message answer", "aria-label": "Answer" }, this.thinking, this.text, this.state, this.bottom);
  }

  update(message, run) {
    const isRunning = run !== null;
    const isWaiting = isRunning && !message.content && !message.reasoning;
    this.root.classList.toggle("running", isRunning);
    this.root.classList.toggle("waiting", isWaiting);
    this.state.textContent = isWaiting ? progressText(run.progress) : "";
    this.root.setAttribute("aria-busy", String(isRunning));
    this.thinking.hidden = !message.reasoning;
    if (message.reasoning) {
      this.thinking.lastChild.textContent = message.reasoning;
      this.thinking.firstChild.textContent = isRunning && !message.content ? "Thinking…" : "Thought before answering";
    }
    renderMarkdown(this.text, message.content, codeBlock);
    this.stats.textContent = statsText(message).join(" · ");
    this.bottom.classList.toggle("hidden", isRunning);
  }
}

/** A question, which can be edited in its place. */
export class QuestionView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.root = element("article", { class: "message question", "aria-label": "You" });
    this.show();
  }

  show() {
    const buttons = element(
      "div",
      { class: "actions" },
      iconButton("copy", "Copy the message", this.actions.copy),
      iconButton("edit", "Edit and send again", () => this.edit()),
    );
    this.root.classList.remove("editing");
    this.root.replaceChildren(element("div", { class: "bubble" }, this.message.content), buttons);
  }

  edit() {
    const area = element("textarea", { rows: "1", "aria-label": "Edit the message" });
    area.value = this.message.content;
    const close = () => {
      this.show();
      this.root.querySelector(".actions button:last-child").focus();
    };
    const send = () => {
      if (area.value.trim()) this.actions.resend(area.value.trim());
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (isSendKey(event)) {
        event.preventDefault();
        send();
      }
    });
    area.addEventListener("input", () => fitHeight(area));
    const buttons = element("div", { class: "edit-actions" }, textButton("Cancel", close), textButton("Send", send, "button primary"));
    this.root.classList.add("editing");
    this.root.replaceChildren(area, buttons);
    fitHeight(area);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

/** Enter alone, and not the one that ends a word of an input method. */
export function isSendKey(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

/** Let a text box be as tall as its text; CSS sets the limit. */
export function fitHeight(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

const PROBLEMS = {
  down: ["The server is away", "It may be starting or may have been stopped. Your messages are kept here."],
  key: ["A key is needed", "This server answers only with an API key."],
  busy: ["The server is busy", "It has as many requests as it can hold. Your message is kept; try again in a moment."],
  loading: ["The model is still loading", "It will answer when it is ready. Your message is kept."],
  "too-long": ["This conversation is too long for the model", null],
  cut: ["The answer is incomplete", "The connection ended early. What had come is kept."],
  engine: ["The answer failed", null],
  refused: ["The server refused this", null],
};

/** A kind word about a Problem, with the ways out: `actions` are [label, function]. */
export function problemCard(problem, actions) {
  const [title, text] = PROBLEMS[problem.kind] ?? PROBLEMS.engine;
  const buttons = actions.map(([label, onClick], index) => textButton(label, onClick, index ? "button" : "button primary"));
  return element(
    "div",
    { class: "problem", role: "alert" },
    icon("alert"),
    element(
      "div",
      {},
      element("strong", {}, title),
      element("p", {}, text ?? problem.message),
      element("div", { class: "problem-actions" }, ...buttons),
    ),
  );
}
