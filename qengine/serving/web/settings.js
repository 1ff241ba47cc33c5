// The settings panel: sampling for all conversations, the system prompt of this one, the theme, the key.
//
// Invariant: an empty field is not sent, so the server's default holds; a field that is out of range is never sent.

import { apiKey } from "./api.js";
import { element } from "./markdown.js";
import { loadTheme, saveTheme } from "./store.js";

const FIELDS = [
  { name: "temperature", label: "Temperature", hint: "0 always takes the likeliest token", min: 0, max: 2, step: 0.1 },
  { name: "top_p", label: "Top p", hint: "keep the likeliest tokens up to this probability", min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", label: "Top k", hint: "keep this many likeliest tokens", min: 0, max: 1_000_000, step: 1, whole: true },
  { name: "min_p", label: "Min p", hint: "drop tokens less likely than this share of the best", min: 0, max: 1, step: 0.01 },
  { name: "max_tokens", label: "Max tokens", hint: "length of an answer at most", min: 1, max: 2 ** 31 - 1, step: 1, whole: true },
  { name: "seed", label: "Seed", hint: "the same seed gives the same answer", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, whole: true },
  { name: "repetition_penalty", label: "Repetition penalty", hint: "above 1 repeats less", min: 0.01, max: 2, step: 0.01 },
  { name: "presence_penalty", label: "Presence penalty", hint: "above 0 brings new words", min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", label: "Frequency penalty", hint: "above 0 repeats words less", min: -2, max: 2, step: 0.1 },
];
const THEMES = { auto: "Theme: as the system", light: "Theme: light", dark: "Theme: dark" };

/** The fields of the panel in `parent`; `onChange(values)` gets the texts that are set. */
export class SamplingFields {
  constructor(parent, values, onChange) {
    this.inputs = new Map();
    for (const field of FIELDS) {
      const input = element("input", {
        type: "number", min: field.min, max: field.max, step: field.whole ? "1" : "any", inputmode: "decimal",
        placeholder: "default", "aria-describedby": `hint-${field.name}`,
      });
      input.value = values[field.name] ?? "";
      input.addEventListener("input", () => onChange(this.values()));
      const hint = element("small", { id: `hint-${field.name}` }, field.hint);
      parent.append(element("label", { class: "field" }, element("span", {}, field.label), input, hint));
      this.inputs.set(field.name, input);
    }
  }

  values() {
    const values = {};
    for (const [name, input] of this.inputs) if (input.value !== "" && input.checkValidity()) values[name] = input.value;
    return values;
  }

  /** The first field whose content cannot be sent, or null. */
  firstInvalid() {
    return [...this.inputs.values()].find((input) => !input.checkValidity()) ?? null;
  }

  clear() {
    for (const input of this.inputs.values()) input.value = "";
  }
}

/** Texts of fields as the numbers that a request carries. */
export function asNumbers(values) {
  const known = FIELDS.filter(({ name }) => values[name]);
  return Object.fromEntries(known.map(({ name }) => [name, Number(values[name])]));
}

/** A button that goes through the system's theme, light and dark. */
export function setUpTheme(button) {
  const show = () => {
    const theme = document.documentElement.dataset.theme ?? "auto";
    button.setAttribute("aria-label", THEMES[theme]);
    button.title = THEMES[theme];
    button.querySelector("use").setAttribute("href", `#i-${theme}`);
  };
  button.addEventListener("click", () => {
    const order = Object.keys(THEMES);
    const theme = order[(order.indexOf(loadTheme() ?? "auto") + 1) % order.length];
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    saveTheme(theme === "auto" ? null : theme);
    show();
  });
  show();
}

/** The dialog that asks for the key. `onKey()` is called once one was given. */
export class KeyDialog {
  constructor(onKey) {
    this.dialog = document.getElementById("key-dialog");
    this.input = document.getElementById("key");
    this.error = document.getElementById("key-error");
    document.getElementById("key-cancel").addEventListener("click", () => this.dialog.close());
    document.getElementById("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      apiKey.set(this.input.value.trim());
      this.dialog.close();
      onKey();
    });
  }

  open() {
    if (this.dialog.open) return;
    this.error.hidden = !apiKey.get();
    this.error.textContent = "The server did not accept this key. Check it, and try again.";
    this.input.value = "";
    this.dialog.showModal();
    this.input.focus();
  }
}
