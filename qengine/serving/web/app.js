// The chat page: conversations, the one that is open, and the answers that are coming.
//
// Invariant: what the user wrote is in `conversation.messages` and saved before anything is sent, and no error removes
// it. Only this module changes conversations; the others draw, talk to the server, or keep things.

import { Run } from "./answering.js";
import { apiKey, listModels } from "./api.js";
import { LoadStrip } from "./load.js";
import { element } from "./markdown.js";
import { AnswerView, QuestionView, copyFrom, fitHeight, isSendKey, problemCard, textButton } from "./messages.js";
import { KeyDialog, SamplingFields, asNumbers, setUpTheme } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";

const SAVE_EVERY_MS = 500;
const RETRY_MS = 3_000;
const TOAST_MS = 7_000;
const NEAR_END_PX = 80;
const IDEAS = [
  ["Explain", "Explain how a bicycle stays upright, in three short paragraphs."],
  ["Write", "Write a friendly note that moves a meeting from Tuesday to Thursday."],
  ["Code", "Write a Python function that merges overlapping intervals, with a short example."],
  ["Compare", "Compare trains and planes for a trip of 600 km. Use a table."],
];

const $ = (id) => document.getElementById(id);
const input = $("input");
const scroller = $("scroller");

class Page {
  constructor() {
    this.settings = store.loadSettings();
    this.conversations = store.loadConversations();
    this.models = [];
    this.runs = new Map();
    this.problems = new Map();
    this.unsaved = new Set();
    this.afterKey = null;
    this.sticksToEnd = true;
    this.keys = new KeyDialog(() => this.onKey());
    this.strip = new LoadStrip($("strip"));
    this.sidebar = new Sidebar({
      open: (id) => this.open(id),
      rename: (id) => this.rename(id),
      exportAs: (id, format) => this.exportAs(id, format),
      remove: (id) => this.remove(id),
    });
    this.sampling = new SamplingFields($("sampling"), this.settings.sampling, (values) => this.keepSampling(values));
    setUpTheme($("theme"));
    this.listen();
    const fromUrl = store.loadConversation(location.hash.slice(1));
    this.show(fromUrl ? this.find(fromUrl.id) : (this.conversations[0] ?? store.newConversation()));
    this.connect();
  }

  find(id) {
    return this.conversations.find((conversation) => conversation.id === id) ?? null;
  }

  // The server

  async connect() {
    clearTimeout(this.connecting);
    try {
      this.models = await listModels();
      this.showModels();
      this.notice(null);
      this.strip.start();
    } catch (error) {
      $("health-dot").className = "dot bad";
      if (error.kind === "key") {
        this.notice("This server answers only with an API key.", ["Enter the key", () => this.keys.open()]);
        this.keys.open();
        return;
      }
      const text = error.kind === "loading" ? "The model is still loading…" : "The server cannot be reached. Trying again…";
      this.notice(text);
      this.connecting = setTimeout(() => this.connect(), RETRY_MS);
    }
  }

  showModels() {
    const names = this.models.map(({ name }) => name);
    if (!names.includes(this.settings.model)) this.settings.model = names[0];
    $("model-name").textContent = shortName(this.settings.model);
    $("model-name").title = this.settings.model;
    $("model-name").hidden = names.length > 1;
    $("model-select").hidden = names.length < 2;
    $("model-select").replaceChildren(...names.map((name) => element("option", { value: name }, name)));
    $("model-select").value = this.settings.model;
    $("health-dot").className = "dot good";
    const { contextLen } = this.models[0];
    const room = contextLen ? ` It keeps ${contextLen.toLocaleString("en")} tokens in mind.` : "";
    $("welcome-model").textContent = `${shortName(this.settings.model)} answers on this server, and nowhere else.${room}`;
    $("key-state").textContent = apiKey.get() ? "A key is kept for this tab." : "This server asks for no key.";
  }

  onKey() {
    const retry = this.afterKey;
    this.afterKey = null;
    this.connect();
    retry?.();
  }

  // Which conversation is open

  open(id) {
    this.sidebar.setOpen(false);
    const conversation = this.find(id);
    if (conversation) this.show(conversation);
    input.focus();
  }

  show(conversation) {
    this.current = conversation;
    history.replaceState(null, "", conversation.messages.length ? `#${conversation.id}` : location.pathname);
    $("system").value = conversation.system;
    this.sticksToEnd = true;
    this.draw();
  }

  startNew() {
    this.sidebar.setOpen(false);
    this.show(store.newConversation());
    input.focus();
  }

  // Drawing

  draw() {
    const { current } = this;
    this.views = new Map();
    const nodes = current.messages.map((message, index) => {
      const view = this.makeView(message, index);
      this.views.set(message, view);
      return view.root;
    });
    $("messages").replaceChildren(...nodes);
    for (const [message, view] of this.views) view.update?.(message, this.runOf(current)?.message === message ? this.runOf(current) : null);
    this.drawProblem();
    this.drawState();
    this.scrollToEnd();
  }

  makeView(message, index) {
    const copy = (button) => copyFrom(button, message.content);
    if (message.role === "user") {
      return new QuestionView(message, { copy, resend: (text) => this.resend(index, text) });
    }
    return new AnswerView({ copy, again: () => this.again(index) });
  }

  drawProblem() {
    $("messages").querySelector(".problem")?.remove();
    const { current } = this;
    const problem = this.problems.get(current.id);
    if (problem) {
      $("messages").append(problemCard(problem, this.waysOut(problem)));
    } else if (current.messages.at(-1)?.role === "user" && !this.runOf(current)) {
      const card = element("div", { class: "unanswered" }, "This message has no answer yet.");
      card.append(textButton("Answer it", () => this.answer()));
      card.classList.add("problem");
      $("messages").append(card);
    }
  }

  waysOut(problem) {
    const retry = ["Try again", () => this.retry()];
    if (problem.kind === "key") {
      this.afterKey = () => this.retry();
      return [["Enter the key", () => this.keys.open()], retry];
    }
    if (problem.kind === "too-long") return [["Start a new chat", () => this.startNew()], retry];
    if (problem.kind === "refused") return [["Open settings", () => $("settings").showModal()], retry];
    return [retry];
  }

  drawState() {
    const running = Boolean(this.runOf(this.current));
    $("send").hidden = running;
    $("stop").hidden = !running;
    $("send").disabled = !input.value.trim();
    $("welcome").hidden = this.current.messages.length > 0;
    document.title = this.current.messages.length ? `${store.titleOf(this.current)} · qengine` : "qengine";
    this.sidebar.draw(this.conversations, this.current.id, this.runs);
  }

  runOf(conversation) {
    return this.runs.get(conversation.id) ?? null;
  }

  scrollToEnd() {
    if (this.sticksToEnd) scroller.scrollTop = scroller.scrollHeight;
    $("to-end").hidden = this.sticksToEnd || scroller.scrollHeight <= scroller.clientHeight;
  }

  // Asking and answering

  send() {
    const text = input.value.trim();
    if (!text || this.runOf(this.current)) return;
    if (!this.samplingIsValid()) return;
    input.value = "";
    fitHeight(input);
    this.current.messages.push({ role: "user", content: text });
    this.answer();
  }

  samplingIsValid() {
    const invalid = this.sampling.firstInvalid();
    if (!invalid) return true;
    $("settings").showModal();
    invalid.focus();
    invalid.reportValidity();
    return false;
  }

  resend(index, text) {
    this.replaceFrom(index, "Later messages were replaced.", [{ role: "user", content: text }]);
    this.answer();
    input.focus();
  }

  again(index) {
    if (!this.samplingIsValid()) return;
    this.replaceFrom(index, "The earlier answer was replaced.");
    this.answer();
    input.focus();
  }

  /** After a problem: a part of an answer that came is replaced. */
  retry() {
    if (this.current.messages.at(-1)?.role === "assistant") this.again(this.current.messages.length - 1);
    else this.answer();
  }

  /** Drop the messages from `index` on, with a way back. */
  replaceFrom(index, words, replacement = []) {
    const conversation = this.current;
    const before = [...conversation.messages];
    this.runOf(conversation)?.stop();
    conversation.messages.splice(index, Infinity, ...replacement);
    if (before.length - index <= replacement.length) return;
    this.toast(words, ["Undo", () => this.restore(conversation, before)]);
  }

  restore(conversation, messages) {
    this.runOf(conversation)?.stop();
    this.runs.delete(conversation.id);
    this.problems.delete(conversation.id);
    conversation.messages.splice(0, Infinity, ...messages);
    this.keep(conversation);
    this.show(conversation);
  }

  async answer() {
    const conversation = this.current;
    this.runOf(conversation)?.stop();
    this.problems.delete(conversation.id);
    const message = { role: "assistant", content: "" };
    const messages = requestMessages(conversation);
    const run = new Run(() => this.makeRequest(message, messages), message, () => this.onPiece(conversation, run));
    conversation.messages.push(message);
    if (!this.conversations.includes(conversation)) this.conversations.unshift(conversation);
    conversation.updatedAt = Date.now();
    this.conversations.sort((a, b) => b.updatedAt - a.updatedAt);
    this.runs.set(conversation.id, run);
    this.keep(conversation);
    this.show(conversation);
    this.announce("The answer is being written.");
    const problem = await run.answer();
    this.onEnd(conversation, run, problem);
  }

  /** The request, once it is known what the server calls its model. */
  async makeRequest(message, messages) {
    if (!this.models.length) {
      this.models = await listModels();
      this.showModels();
    }
    message.model = this.settings.model;
    return { model: message.model, messages, ...asNumbers(this.sampling.values()) };
  }

  onPiece(conversation, run) {
    this.keepSoon(conversation);
    if (conversation !== this.current || this.isDrawing) return;
    this.isDrawing = true;
    requestAnimationFrame(() => {
      this.isDrawing = false;
      this.views.get(run.message)?.update(run.message, this.runs.get(this.current.id) === run ? run : null);
      this.scrollToEnd();
    });
  }

  onEnd(conversation, run, problem) {
    // Another run may have taken its place, or Undo the whole answer.
    if (this.runs.get(conversation.id) === run) this.runs.delete(conversation.id);
    else return;
    const { message } = run;
    if (!message.content && !message.reasoning) conversation.messages = conversation.messages.filter((m) => m !== message);
    if (problem) this.problems.set(conversation.id, problem);
    this.keep(conversation);
    if (conversation === this.current) this.showEnd(run, problem);
    else this.drawState();
    if (problem?.kind === "key") this.keys.open();
    // A server that was started again may have another model.
    if (["down", "refused"].includes(problem?.kind)) this.connect();
  }

  showEnd(run, problem) {
    const view = this.views.get(run.message);
    if (this.current.messages.includes(run.message)) view?.update(run.message, null);
    else view?.root.remove();
    this.drawProblem();
    this.drawState();
    this.scrollToEnd();
    if (!problem) this.announce(`${run.message.finish === "stopped" ? "Stopped." : "Answered."} ${run.message.content}`);
  }

  // Keeping

  keepSoon(conversation) {
    this.unsaved.add(conversation);
    this.saving ??= setTimeout(() => {
      this.saving = null;
      for (const changed of this.unsaved) this.keep(changed);
      this.unsaved.clear();
    }, SAVE_EVERY_MS);
  }

  keep(conversation) {
    if (!this.conversations.includes(conversation)) return;
    const kept = { ...conversation, messages: conversation.messages.filter((m) => m.role === "user" || m.content || m.reasoning) };
    if (store.saveConversation(kept)) return;
    if (!this.saidFull) this.toast("This browser has no room left: export or delete a conversation to keep this one.");
    this.saidFull = true;
  }

  keepSampling(values) {
    this.settings.sampling = values;
    store.saveSettings(this.settings);
  }

  rename(id) {
    const conversation = this.find(id);
    $("rename").value = store.titleOf(conversation);
    $("rename-form").onsubmit = (event) => {
      event.preventDefault();
      conversation.title = $("rename").value.trim();
      this.keep(conversation);
      this.drawState();
      $("rename-dialog").close();
    };
    $("rename-dialog").showModal();
    $("rename").select();
  }

  exportAs(id, format) {
    const conversation = this.find(id);
    const name = store.titleOf(conversation).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "chat";
    if (format === "md") download(`${name}.md`, "text/markdown", store.asMarkdown(conversation));
    else download(`${name}.json`, "application/json", JSON.stringify(conversation, null, 2));
  }

  remove(id) {
    const conversation = this.find(id);
    this.runs.get(id)?.stop();
    this.conversations = this.conversations.filter((other) => other !== conversation);
    store.deleteConversation(id);
    if (conversation === this.current) this.show(this.conversations[0] ?? store.newConversation());
    else this.drawState();
    this.toast("The conversation was deleted.", ["Undo", () => this.bringBack(conversation)]);
    input.focus();
  }

  bringBack(conversation) {
    this.conversations.push(conversation);
    this.conversations.sort((a, b) => b.updatedAt - a.updatedAt);
    this.keep(conversation);
    this.show(conversation);
  }

  /** Another tab has changed a conversation: take its state, unless this tab is just answering in it. */
  onStorage(key) {
    const id = store.idOfKey(key);
    if (id === null || this.runs.has(id)) return;
    const changed = store.loadConversation(id);
    const known = this.find(id);
    if (changed && known) Object.assign(known, changed);
    else if (changed) this.conversations.push(changed);
    else this.conversations = this.conversations.filter((conversation) => conversation.id !== id);
    this.conversations.sort((a, b) => b.updatedAt - a.updatedAt);
    if (id === this.current.id && changed) this.draw();
    else this.drawState();
  }

  // Words for the user

  notice(text, action = null) {
    $("notice").hidden = text === null;
    $("notice").replaceChildren(text ?? "", ...(action ? [textButton(action[0], action[1])] : []));
  }

  toast(text, action = null) {
    clearTimeout(this.toasting);
    const hide = () => {
      $("toast").hidden = true;
    };
    const undo = action && textButton(action[0], () => (hide(), action[1]()), "text-button");
    $("toast").replaceChildren(text, ...(undo ? [undo] : []));
    $("toast").hidden = false;
    this.toasting = setTimeout(hide, TOAST_MS);
  }

  announce(text) {
    $("announcer").textContent = text;
  }

  // Events

  listen() {
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    input.addEventListener("keydown", (event) => {
      if (!isSendKey(event)) return;
      event.preventDefault();
      this.send();
    });
    input.addEventListener("input", () => {
      fitHeight(input);
      $("send").disabled = !input.value.trim();
    });
    $("stop").addEventListener("click", () => {
      this.runOf(this.current)?.stop();
      input.focus();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.runOf(this.current)?.stop();
    });
    scroller.addEventListener("scroll", () => {
      this.sticksToEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END_PX;
      $("to-end").hidden = this.sticksToEnd;
    });
    $("to-end").addEventListener("click", () => {
      this.sticksToEnd = true;
      this.scrollToEnd();
    });
    $("new-chat").addEventListener("click", () => this.startNew());
    $("export-all").addEventListener("click", () =>
      download("qengine-chats.json", "application/json", JSON.stringify(this.conversations, null, 2)),
    );
    this.listenToSettings();
    addEventListener("storage", (event) => this.onStorage(event.key));
    addEventListener("pagehide", () => {
      for (const id of this.runs.keys()) if (this.find(id)) this.keep(this.find(id));
    });
    $("ideas").append(
      ...IDEAS.map(([title, text]) => {
        const idea = element("button", { type: "button", class: "idea" }, element("strong", {}, title), element("span", {}, text));
        idea.addEventListener("click", () => {
          input.value = text;
          this.send();
        });
        return idea;
      }),
    );
  }

  listenToSettings() {
    $("open-settings").addEventListener("click", () => $("settings").showModal());
    $("rename-cancel").addEventListener("click", () => $("rename-dialog").close());
    $("change-key").addEventListener("click", () => this.keys.open());
    $("system").addEventListener("input", () => {
      this.current.system = $("system").value;
      this.keep(this.current);
    });
    $("reset-sampling").addEventListener("click", () => {
      this.sampling.clear();
      this.keepSampling({});
    });
    $("model-select").addEventListener("change", () => {
      this.settings.model = $("model-select").value;
      store.saveSettings(this.settings);
    });
    for (const dialog of document.querySelectorAll("dialog")) {
      dialog.addEventListener("click", (event) => {
        if (event.target === dialog) dialog.close();
      });
    }
  }
}

function requestMessages({ system, messages }) {
  const opening = system.trim() ? [{ role: "system", content: system.trim() }] : [];
  return [...opening, ...messages.map(({ role, content }) => ({ role, content }))];
}

function shortName(name) {
  return name.split("/").filter(Boolean).at(-1) ?? name;
}

function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

new Page();
