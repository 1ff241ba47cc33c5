// Conversations and settings, kept in this browser's localStorage.
//
// Invariant: what is read back is checked, whoever wrote it, and a full or forbidden storage never loses what is on the
// screen: saving says whether it worked. Each conversation has its own entry, so two tabs do not overwrite each other.

const PREFIX = "qengine:conversation:";
const SETTINGS = "qengine:settings";
const MAX_TITLE_CHARS = 80;

export function newConversation(system = "") {
  return { id: newId(), title: "", createdAt: Date.now(), updatedAt: Date.now(), system, messages: [] };
}

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(9));
  return Array.from(bytes, (byte) => byte.toString(36).padStart(2, "0")).join("");
}

/** All conversations, the latest first. */
export function loadConversations() {
  const found = [];
  for (const key of storageKeys()) {
    if (!key.startsWith(PREFIX)) continue;
    const conversation = asConversation(read(key), key.slice(PREFIX.length));
    if (conversation) found.push(conversation);
  }
  return found.sort((a, b) => b.updatedAt - a.updatedAt);
}

export function loadConversation(id) {
  return asConversation(read(PREFIX + id), id);
}

/** Whether it was kept. */
export function saveConversation(conversation) {
  return write(PREFIX + conversation.id, conversation);
}

export function deleteConversation(id) {
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // Without storage there is nothing to remove.
  }
}

export function idOfKey(key) {
  return key?.startsWith(PREFIX) ? key.slice(PREFIX.length) : null;
}

export function loadSettings() {
  const found = read(SETTINGS);
  const sampling = {};
  for (const [name, value] of Object.entries(found?.sampling ?? {})) {
    if (typeof value === "string" && value.length <= 400) sampling[name] = value;
  }
  return { sampling, model: typeof found?.model === "string" ? found.model : null };
}

export function saveSettings(settings) {
  return write(SETTINGS, settings);
}

export function loadTheme() {
  try {
    return localStorage.getItem("qengine:theme");
  } catch {
    return null;
  }
}

export function saveTheme(theme) {
  try {
    if (theme === null) localStorage.removeItem("qengine:theme");
    else localStorage.setItem("qengine:theme", theme);
  } catch {
    // It holds until the page is closed.
  }
}

/** The beginning of the first question. */
export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = conversation.messages.find((message) => message.role === "user");
  const line = (first?.content ?? "").trim().replace(/\s+/g, " ");
  if (!line) return "New chat";
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
}

export function asMarkdown(conversation) {
  const parts = [`# ${titleOf(conversation)}`];
  if (conversation.system) parts.push(`**System**\n\n${conversation.system}`);
  for (const message of conversation.messages) {
    parts.push(`**${message.role === "user" ? "You" : (message.model ?? "Model")}**\n\n${message.content}`);
  }
  return `${parts.join("\n\n")}\n`;
}

function asConversation(value, id) {
  if (typeof value !== "object" || value === null || !Array.isArray(value.messages)) return null;
  const messages = value.messages.filter(
    (message) => ["user", "assistant"].includes(message?.role) && typeof message.content === "string",
  );
  if (!messages.length) return null;
  return {
    id,
    title: typeof value.title === "string" ? value.title.slice(0, MAX_TITLE_CHARS) : "",
    createdAt: Number(value.createdAt) || 0,
    updatedAt: Number(value.updatedAt) || 0,
    system: typeof value.system === "string" ? value.system : "",
    messages: messages.map(asMessage),
  };
}

function asMessage(message) {
  const checked = { role: message.role, content: message.content };
  for (const name of ["reasoning", "model", "finish"]) {
    if (typeof message[name] === "string") checked[name] = message[name];
  }
  if (typeof message.stats === "object" && message.stats !== null) {
    checked.stats = {};
    for (const [name, value] of Object.entries(message.stats)) {
      if (typeof value === "number" || typeof value === "boolean") checked.stats[name] = value;
    }
  }
  return checked;
}

function storageKeys() {
  try {
    return Object.keys(localStorage);
  } catch {
    return [];
  }
}

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
