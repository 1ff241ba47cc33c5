// The list of conversations, and what can be done with one.
//
// Invariant: it draws what it is given; the page owns the conversations. On a narrow screen it is a drawer that keeps
// the keyboard inside while it is open.

import { element } from "./markdown.js";
import { iconButton } from "./messages.js";
import { titleOf } from "./store.js";

const DAY_MS = 86_400_000;

export class Sidebar {
  /** `on` has open(id), rename(id), exportAs(id, format), remove(id). */
  constructor(on) {
    this.on = on;
    this.root = document.getElementById("sidebar");
    this.list = document.getElementById("conversations");
    this.scrim = document.getElementById("scrim");
    this.opener = document.getElementById("open-sidebar");
    this.menu = new Menu(document.getElementById("menu"));
    this.opener.addEventListener("click", () => this.setOpen(true));
    for (const node of [this.scrim, document.getElementById("close-sidebar")]) {
      node.addEventListener("click", () => this.setOpen(false));
    }
    this.root.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.isOpen) {
        event.stopPropagation();
        this.setOpen(false);
      }
    });
  }

  get isOpen() {
    return this.root.classList.contains("open");
  }

  setOpen(open) {
    if (open === this.isOpen) return;
    this.root.classList.toggle("open", open);
    this.scrim.hidden = !open;
    document.querySelector(".main").inert = open;
    this.opener.setAttribute("aria-expanded", String(open));
    (open ? document.getElementById("close-sidebar") : this.opener).focus();
  }

  draw(conversations, currentId, runningIds) {
    const items = [];
    let heading = null;
    for (const conversation of conversations) {
      const age = ageOf(conversation.updatedAt);
      if (age !== heading) items.push(element("li", { class: "age" }, (heading = age)));
      items.push(this.item(conversation, conversation.id === currentId, runningIds.has(conversation.id)));
    }
    if (!items.length) items.push(element("li", { class: "none" }, "Nothing yet. Your conversations will be listed here."));
    this.list.replaceChildren(...items);
  }

  item(conversation, isCurrent, isRunning) {
    const { id } = conversation;
    const title = titleOf(conversation);
    const open = element("button", { type: "button", class: "conversation-open", title }, title);
    if (isCurrent) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => this.on.open(id));
    const more = iconButton("more", `More for ${title}`, () =>
      this.menu.open(more, [
        ["Rename", () => this.on.rename(id)],
        ["Export as Markdown", () => this.on.exportAs(id, "md")],
        ["Export as JSON", () => this.on.exportAs(id, "json")],
        ["Delete", () => this.on.remove(id)],
      ]),
    );
    more.setAttribute("aria-haspopup", "menu");
    const classes = ["conversation", isCurrent && "current", isRunning && "running"].filter(Boolean).join(" ");
    return element("li", { class: classes }, open, more);
  }
}

function ageOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY_MS) return "Yesterday";
  return time >= midnight - 7 * DAY_MS ? "This week" : "Earlier";
}

/** One menu for all buttons, as ARIA describes it: arrows move, Escape and Tab close. */
class Menu {
  constructor(root) {
    this.root = root;
    root.addEventListener("keydown", (event) => this.onKey(event));
    document.addEventListener("pointerdown", (event) => {
      if (!root.contains(event.target)) this.close(false);
    });
  }

  open(button, entries) {
    this.button = button;
    this.root.replaceChildren(
      ...entries.map(([label, run]) => {
        const item = element("button", { type: "button", role: "menuitem", tabindex: "-1" }, label);
        item.addEventListener("click", () => {
          this.close();
          run();
        });
        return item;
      }),
    );
    this.root.hidden = false;
    const box = button.getBoundingClientRect();
    const size = this.root.getBoundingClientRect();
    const left = Math.min(box.left, innerWidth - size.width - 8);
    const below = box.bottom + 4;
    this.root.style.left = `${Math.max(8, left)}px`;
    this.root.style.top = `${below + size.height > innerHeight - 8 ? Math.max(8, box.top - size.height - 4) : below}px`;
    this.root.firstChild.focus();
  }

  close(returnFocus = true) {
    if (this.root.hidden) return;
    this.root.hidden = true;
    if (returnFocus) this.button.focus();
  }

  onKey(event) {
    const items = [...this.root.children];
    const at = items.indexOf(document.activeElement);
    const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: items.length - 1 };
    if (event.key in moves) {
      event.preventDefault();
      items[(moves[event.key] + items.length) % items.length].focus();
    } else if (event.key === "Escape" || event.key === "Tab") {
      event.preventDefault();
      event.stopPropagation();
      this.close();
    }
  }
}
