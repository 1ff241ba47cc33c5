// Markdown to DOM nodes.
//
// Invariant: text from a model only ever becomes text nodes and the attributes href, title and start, after a check;
// nothing is parsed as HTML, so nothing in an answer can run. Every loop moves forward and every search is bounded, so
// hostile text costs at most a few milliseconds. A subset of CommonMark with GitHub's tables and task lists.

const MAX_DEPTH = 8;
// Longer runs of text without a blank line are shown as they are: they are data, not prose.
const MAX_INLINE_CHARS = 20_000;
const MAX_SPAN_CHARS = 2_000;
const SAFE_PROTOCOLS = new Set(["http:", "https:", "mailto:"]);

const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,5})([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/** A node with text or other nodes inside; there is no way to pass HTML. */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** Draw `text` into `parent`, keeping the nodes of blocks that did not change since the last call. */
export function renderMarkdown(parent, text, makeCodeBlock) {
  const blocks = splitBlocks(text);
  const drawn = parent.drawnBlocks ?? [];
  let same = 0;
  while (same < blocks.length && same < drawn.length && blocks[same] === drawn[same].source) same++;
  for (const stale of drawn.splice(same)) for (const node of stale.nodes) node.remove();
  for (const source of blocks.slice(same)) {
    const nodes = [];
    const holder = document.createDocumentFragment();
    renderBlocks(holder, source.split("\n"), makeCodeBlock, 0);
    nodes.push(...holder.childNodes);
    parent.append(holder);
    drawn.push({ source, nodes });
  }
  parent.drawnBlocks = drawn;
}

/** Cut at blank lines outside of fences, so that a growing answer only redraws its last block. */
function splitBlocks(text) {
  const blocks = [];
  let lines = [];
  let fence = null;
  const flush = () => {
    if (lines.some((line) => line.trim())) blocks.push(lines.join("\n"));
    lines = [];
  };
  const all = text.replace(/\r\n?/g, "\n").split("\n");
  for (let i = 0; i < all.length; i++) {
    const line = all[i];
    if (fence === null && !line.trim() && !continuesList(lines, all[i + 1])) {
      flush();
      continue;
    }
    fence = fenceAfter(fence, line);
    lines.push(line);
  }
  flush();
  return blocks;
}

/** Whether a blank line stands inside a list: the next line is another item, or indented text of the last one. */
function continuesList(lines, next) {
  if (!lines.length || !ITEM.test(lines[0]) || next === undefined) return false;
  return ITEM.test(next) || /^ {2,}\S/.test(next);
}

function fenceAfter(fence, line) {
  const found = FENCE.exec(line.replace(/^[ \t]+/, ""));
  if (fence === null) return found ? found[2] : null;
  const closes = found && found[2][0] === fence[0] && found[2].length >= fence.length && !found[3].trim();
  return closes ? null : fence;
}

// Blocks

function renderBlocks(parent, lines, makeCodeBlock, depth) {
  let i = 0;
  while (i < lines.length) {
    if (!lines[i].trim()) {
      i++;
      continue;
    }
    if (depth >= MAX_DEPTH) {
      parent.append(element("p", {}, lines.slice(i).join("\n")));
      return;
    }
    i = renderBlock(parent, lines, i, makeCodeBlock, depth);
  }
}

/** Draw the block that begins at line i and return the line after it. */
function renderBlock(parent, lines, i, makeCodeBlock, depth) {
  const line = lines[i];
  const fence = FENCE.exec(line);
  if (fence) return renderFence(parent, lines, i, fence, makeCodeBlock);
  const heading = HEADING.exec(line);
  if (heading) {
    const node = element(`h${Math.min(6, heading[1].length + 1)}`);
    renderInline(node, heading[2].replace(/[ \t]+#+[ \t]*$/, ""));
    parent.append(node);
    return i + 1;
  }
  if (RULE.test(line)) {
    parent.append(element("hr"));
    return i + 1;
  }
  if (QUOTE.test(line)) return renderQuote(parent, lines, i, makeCodeBlock, depth);
  if (ITEM.test(line)) return renderList(parent, lines, i, makeCodeBlock, depth);
  if (line.includes("|") && i + 1 < lines.length && lines[i + 1].includes("-") && TABLE_RULE.test(lines[i + 1])) {
    return renderTable(parent, lines, i);
  }
  return renderParagraph(parent, lines, i);
}

function renderFence(parent, lines, start, [, indent, marks, info], makeCodeBlock) {
  let end = start + 1;
  while (end < lines.length && fenceAfter(marks, lines[end]) !== null) end++;
  const code = lines.slice(start + 1, end).map((line) => {
    let cut = 0;
    while (cut < indent.length && line[cut] === " ") cut++;
    return line.slice(cut);
  });
  parent.append(makeCodeBlock(code.join("\n"), info.trim().split(/\s+/)[0].slice(0, 30)));
  return end + 1;
}

function renderQuote(parent, lines, start, makeCodeBlock, depth) {
  let end = start;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const node = element("blockquote");
  renderBlocks(node, lines.slice(start, end).map((line) => line.replace(QUOTE, "")), makeCodeBlock, depth + 1);
  parent.append(node);
  return end;
}

function renderList(parent, lines, start, makeCodeBlock, depth) {
  const first = ITEM.exec(lines[start]);
  const ordered = /\d/.test(first[2]);
  const list = element(ordered ? "ol" : "ul");
  if (ordered && first[2].slice(0, -1) !== "1") list.setAttribute("start", String(parseInt(first[2], 10)));
  let i = start;
  while (i < lines.length) {
    if (!lines[i].trim() && i + 1 < lines.length && isItemAt(lines[i + 1], first[1].length)) i++;
    const item = ITEM.exec(lines[i]);
    if (!item || item[1].length > first[1].length + 1 || /\d/.test(item[2]) !== ordered || RULE.test(lines[i])) break;
    const width = item[0].length;
    const own = [lines[i].slice(width)];
    i++;
    while (i < lines.length && belongsToItem(lines, i, item[1].length)) {
      own.push(lines[i].slice(Math.min(width, lines[i].length - lines[i].trimStart().length)));
      i++;
    }
    list.append(renderItem(own, makeCodeBlock, depth));
  }
  parent.append(list);
  return i;
}

/** Indented lines belong to an item, blank ones if more of it follows, and plain ones that continue its paragraph. */
function belongsToItem(lines, i, indent) {
  const line = lines[i];
  if (!line.trim()) return i + 1 < lines.length && /^ {2,}\S/.test(lines[i + 1]) && !isItemAt(lines[i + 1], indent);
  if (isItemAt(line, indent)) return false;
  if (/^ {2,}/.test(line)) return true;
  return Boolean(lines[i - 1].trim()) && !startsBlock(line);
}

function isItemAt(line, indent) {
  const item = ITEM.exec(line);
  return Boolean(item) && item[1].length <= indent + 1;
}

function renderItem(lines, makeCodeBlock, depth) {
  const node = element("li");
  const task = /^\[([ xX])\][ \t]+/.exec(lines[0]);
  if (task) {
    const box = element("input", { type: "checkbox", disabled: "" });
    box.checked = task[1] !== " ";
    node.className = "task";
    node.append(box);
    lines[0] = lines[0].slice(task[0].length);
  }
  renderBlocks(node, lines, makeCodeBlock, depth + 1);
  const [only] = node.querySelectorAll(":scope > p");
  if (only && node.querySelectorAll(":scope > p").length === 1) only.replaceWith(...only.childNodes);
  return node;
}

function renderTable(parent, lines, start) {
  const aligns = cells(lines[start + 1]).map((rule) => {
    if (!rule.endsWith(":")) return "";
    return rule.startsWith(":") ? "center" : "right";
  });
  const row = (line, tag) => {
    const node = element("tr");
    const texts = cells(line);
    aligns.forEach((align, column) => {
      const cell = element(tag, align ? { class: align } : {});
      renderInline(cell, texts[column] ?? "");
      node.append(cell);
    });
    return node;
  };
  const body = element("tbody");
  let i = start + 2;
  while (i < lines.length && lines[i].includes("|") && lines[i].trim()) body.append(row(lines[i++], "td"));
  const table = element("table", {}, element("thead", {}, row(lines[start], "th")), body);
  parent.append(element("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, table));
  return i;
}

function cells(line) {
  const found = [];
  let cell = "";
  let inCode = false;
  const text = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "`") inCode = !inCode;
    if (text[i] === "\\" && text[i + 1] === "|") {
      cell += "|";
      i++;
    } else if (text[i] === "|" && !inCode) {
      found.push(cell.trim());
      cell = "";
    } else cell += text[i];
  }
  found.push(cell.trim());
  return found;
}

function startsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
}

function renderParagraph(parent, lines, start) {
  let end = start + 1;
  while (end < lines.length && lines[end].trim() && !startsBlock(lines[end])) end++;
  const node = element("p");
  renderInline(node, lines.slice(start, end).map((line) => line.trimStart()).join("\n"));
  parent.append(node);
  return end;
}

// Inline

/** Draw code, emphasis, links and line breaks of `text` into `parent`. */
export function renderInline(parent, text, depth = 0) {
  if (text.length > MAX_INLINE_CHARS || depth > MAX_DEPTH) {
    parent.append(text);
    return;
  }
  let plain = "";
  const flush = () => {
    if (plain) parent.append(plain);
    plain = "";
  };
  let i = 0;
  while (i < text.length) {
    const found = spanAt(text, i, depth);
    if (found) {
      flush();
      parent.append(found.node);
      i = found.end;
    } else if (text[i] === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
    } else {
      plain += text[i++];
    }
  }
  flush();
}

/** The span that begins at i, as {node, end}, or null. */
function spanAt(text, i, depth) {
  switch (text[i]) {
    case "`":
      return codeAt(text, i);
    case "*":
    case "_":
      return emphasisAt(text, i, depth);
    case "~":
      return text.startsWith("~~", i) ? between(text, i, "~~", "del", depth) : null;
    case "!":
      return text[i + 1] === "[" ? linkAt(text, i + 1, depth) : null;
    case "[":
      return linkAt(text, i, depth);
    case "<":
      return autolinkAt(text, i);
    case "\n":
      return { node: element("br"), end: i + 1 };
    case "h":
    case "H":
      return i === 0 || /[\s(>"']/.test(text[i - 1]) ? bareLinkAt(text, i) : null;
    default:
      return null;
  }
}

function findClose(text, mark, from) {
  const end = text.slice(from, from + MAX_SPAN_CHARS).indexOf(mark);
  return end < 0 ? -1 : from + end;
}

function codeAt(text, i) {
  const marks = /^`+/.exec(text.slice(i, i + 64))[0];
  let close = findClose(text, marks, i + marks.length);
  while (close >= 0 && text[close + marks.length] === "`") {
    let past = close;
    while (text[past] === "`") past++;
    close = findClose(text, marks, past);
  }
  if (close < 0) return { node: document.createTextNode(marks), end: i + marks.length };
  let code = text.slice(i + marks.length, close).replaceAll("\n", " ");
  if (code.startsWith(" ") && code.endsWith(" ") && code.trim()) code = code.slice(1, -1);
  return { node: element("code", {}, code), end: close + marks.length };
}

function emphasisAt(text, i, depth) {
  const mark = text[i];
  // snake_case is a word, not emphasis.
  if (mark === "_" && i > 0 && /[\p{L}\p{N}_]/u.test(text[i - 1])) return null;
  if (text.startsWith(mark.repeat(3), i)) {
    const both = between(text, i, mark.repeat(3), "strong", depth, "em");
    if (both) return both;
  }
  if (text[i + 1] === mark) return between(text, i, mark + mark, "strong", depth);
  return between(text, i, mark, "em", depth);
}

/** Text between two equal marks, which must touch it on the inside. */
function between(text, i, mark, tag, depth, innerTag = null) {
  const from = i + mark.length;
  if (from >= text.length || /\s/.test(text[from])) return null;
  let close = findClose(text, mark, from);
  while (close >= 0 && !closes(text, close, mark, from)) close = findClose(text, mark, close + 1);
  if (close < 0) return null;
  const node = element(tag);
  const inner = innerTag ? node.appendChild(element(innerTag)) : node;
  renderInline(inner, text.slice(from, close), depth + 1);
  return { node, end: close + mark.length };
}

function closes(text, at, mark, from) {
  if (at === from || /\s/.test(text[at - 1]) || text[at - 1] === "\\") return false;
  const after = text[at + mark.length] ?? "";
  if (mark.length === 1 && (after === mark || text[at - 1] === mark)) return false;
  return mark[0] !== "_" || !/[\p{L}\p{N}]/u.test(after);
}

function linkAt(text, i, depth) {
  const middle = findClose(text, "](", i + 1);
  if (middle < 0 || text.slice(i, middle).includes("\n\n")) return null;
  let end = middle + 2;
  let open = 1;
  while (end < text.length && end < middle + MAX_SPAN_CHARS && open > 0) {
    if (text[end] === "(") open++;
    if (text[end] === ")") open--;
    end++;
  }
  if (open > 0) return null;
  const inside = text.slice(middle + 2, end - 1).trim();
  const [, address, title] = /^<?([^\s>]*)>?(?:\s+["'(](.*)["')])?$/.exec(inside) ?? [];
  if (address === undefined) return null;
  const node = link(address);
  if (title) node.title = title;
  renderInline(node, text.slice(i + 1, middle) || address, depth + 1);
  return { node, end };
}

function autolinkAt(text, i) {
  const found = /^<((?:https?:\/\/|mailto:)[^\s<>]+)>/i.exec(text.slice(i, i + MAX_SPAN_CHARS));
  return found && { node: element("span", {}, withText(link(found[1]), found[1])), end: i + found[0].length };
}

function bareLinkAt(text, i) {
  const found = /^https?:\/\/[^\s<>"'`]+/i.exec(text.slice(i, i + MAX_SPAN_CHARS));
  if (!found) return null;
  let address = found[0].replace(/[.,;:!?*_~]+$/, "");
  if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
  return { node: withText(link(address), address), end: i + address.length };
}

function withText(node, text) {
  node.append(text);
  return node;
}

/** A link if the address is of a kind that cannot run anything, else a plain span. */
export function link(address) {
  const url = safeUrl(address);
  if (url === null) return element("span");
  return element("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow" });
}

/** The absolute address, or null unless it is http, https or mailto. Relative ones would lead into this server. */
export function safeUrl(address) {
  try {
    const url = new URL(address);
    return SAFE_PROTOCOLS.has(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}
