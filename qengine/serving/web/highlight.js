// Colours for code: comments, strings, numbers and the words that most languages share.
//
// Invariant: joined, the pieces are the code; one pass, each character is looked at once, whatever the code is.

const WORDS = new Set(
  ("abstract and as assert async await bool break case catch char class const continue def default del do double elif " +
    "else enum except export extends false False final finally float fn for foreach from func function global goto if " +
    "impl implements import in instanceof int interface is lambda let long loop match module mut namespace new nil None " +
    "nonlocal not null or package pass private protected pub public raise return self short static str string struct " +
    "super switch then this throw throws trait true True try type typeof union unsafe use using var void where while " +
    "with yield select insert update delete create table from join group order by limit values into " +
    "echo fi done esac local").split(" "),
);
const HASH_COMMENTS = new Set("py python sh bash shell zsh rb ruby yaml yml toml r perl pl make makefile dockerfile console".split(" "));
const DASH_COMMENTS = new Set(["sql", "lua", "haskell", "hs"]);
const PLAIN = new Set(["", "text", "txt", "plain", "output", "markdown", "md"]);
const MAX_CHARS = 50_000;

/** Pieces of `code` as [kind, text]; the kind is "" for most of it. */
export function pieces(code, language) {
  const name = language.toLowerCase();
  if (PLAIN.has(name) || code.length > MAX_CHARS) return [["", code]];
  const comment = HASH_COMMENTS.has(name) ? "#[^\\n]*" : DASH_COMMENTS.has(name) ? "--[^\\n]*" : "//[^\\n]*|/\\*[^]*?(?:\\*/|$)";
  const string = "\"\"\"[^]*?(?:\"\"\"|$)|\"(?:\\\\.|[^\"\\\\\\n])*\"?|'(?:\\\\.|[^'\\\\\\n])*'|`(?:\\\\.|[^`\\\\])*`?";
  const pattern = new RegExp(`(${comment})|(${string})|\\b(\\d[\\w.]*)|([A-Za-z_]\\w*)(?=(\\s*\\()?)`, "g");
  const found = [];
  let at = 0;
  for (const match of code.matchAll(pattern)) {
    const kind = kindOf(match);
    if (!kind) continue;
    if (match.index > at) found.push(["", code.slice(at, match.index)]);
    found.push([kind, match[0]]);
    at = match.index + match[0].length;
  }
  if (at < code.length) found.push(["", code.slice(at)]);
  return found;
}

function kindOf([, comment, string, number, word, call]) {
  if (comment) return "comment";
  if (string) return "string";
  if (number) return "number";
  if (WORDS.has(word)) return "word";
  return call ? "call" : "";
}
