import type { HfAddedToken } from "../../model/index.ts";
import { NEWLINE, SPACE, UNIT_CLASS } from "./character-class.ts";

/**
 * Finds added tokens (`<|im_start|>`, `<think>`, ...) inside text: leftmost, then longest, as the reference library does.
 * Cost: one search for the first characters of all tokens (native when all begin alike, as `<` in most models), a walk
 * through a trie at each hit.
 */
interface TrieNode {
  readonly next: Map<number, TrieNode>;
  token: HfAddedToken | undefined;
}

/** Where a token was found: `start` and `end` include the white space that its flags swallow. */
export interface AddedTokenMatch {
  start: number;
  end: number;
  id: number;
}

export class AddedTokenSplitter {
  readonly #root: TrieNode = { next: new Map(), token: undefined };
  /** What finds the first characters; undefined without tokens. */
  readonly #firstCharacter: RegExp | string | undefined;

  constructor(tokens: readonly HfAddedToken[]) {
    const firsts = new Set<string>();
    for (const token of tokens) {
      if (token.content === "") continue;
      firsts.add(token.content.charAt(0));
      let node = this.#root;
      for (let index = 0; index < token.content.length; index++) {
        const unit = token.content.charCodeAt(index);
        let child = node.next.get(unit);
        if (child === undefined) node.next.set(unit, (child = { next: new Map(), token: undefined }));
        node = child;
      }
      node.token = token;
    }
    // Without the u flag a class of units also finds the first half of a pair.
    const escaped = [...firsts].map((unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`).join("");
    if (firsts.size > 0) this.#firstCharacter = firsts.size === 1 ? [...firsts][0] : new RegExp(`[${escaped}]`, "g");
  }

  /** The first match at or after `from`, or undefined. */
  find(text: string, from: number): AddedTokenMatch | undefined {
    for (let hit = this.#search(text, from); hit >= 0; hit = this.#search(text, hit + 1)) {
      const token = this.#longestAt(text, hit);
      if (token !== undefined) return stretch(text, from, hit, token);
    }
    return undefined;
  }

  #search(text: string, from: number): number {
    const search = this.#firstCharacter;
    if (search === undefined) return -1;
    if (typeof search === "string") return text.indexOf(search, from);
    search.lastIndex = from;
    return search.exec(text)?.index ?? -1;
  }

  #longestAt(text: string, start: number): HfAddedToken | undefined {
    let longest: HfAddedToken | undefined;
    let node: TrieNode | undefined = this.#root;
    for (let index = start; index < text.length; index++) {
      node = node.next.get(text.charCodeAt(index));
      if (node === undefined) break;
      if (node.token !== undefined) longest = node.token;
    }
    return longest !== undefined && longest.single_word === true && isInsideWord(text, start, longest.content.length)
      ? undefined
      : longest;
  }
}

function stretch(text: string, from: number, start: number, token: HfAddedToken): AddedTokenMatch {
  let end = start + token.content.length;
  if (token.lstrip === true) while (start > from && isSpace(text, start - 1)) start--;
  if (token.rstrip === true) while (end < text.length && isSpace(text, end)) end++;
  return { start, end, id: token.id };
}

function isSpace(text: string, index: number): boolean {
  const kind = UNIT_CLASS[text.charCodeAt(index)];
  return kind === SPACE || kind === NEWLINE;
}

function isInsideWord(text: string, start: number, length: number): boolean {
  const word = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}]/u;
  const before = start > 0 ? text.slice(Math.max(0, start - 2), start) : "";
  const after = text.codePointAt(start + length);
  const lastBefore = Array.from(before).pop();
  return (
    (lastBefore !== undefined && word.test(lastBefore)) ||
    (after !== undefined && word.test(String.fromCodePoint(after)))
  );
}
