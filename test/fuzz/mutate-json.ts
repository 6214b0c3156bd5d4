import type { Random } from "../../src/std/index.ts";
import { targetOf, type AnyTarget } from "./fuzzer.ts";
import { below, pick } from "./mutate-bytes.ts";

/**
 * JSON that is nearly right: valid documents whose parts are swapped for what validators forget. A document is a tree
 * that can say what `JSON.stringify` cannot: a key twice, `__proto__` as a key, numbers and strings as their own text.
 */
export type Tree =
  | { readonly raw: string }
  | { readonly items: readonly Tree[] }
  | { readonly entries: readonly (readonly [key: string, value: Tree])[] };

/** Scalars as JSON text. The strings: lone surrogates, NUL, what looks like markup, special tokens and templates. */
const SCALARS = [
  ..."null true false 0 -0 1 -1 2 0.5 1e308 -1e308 1e400 1e-400 255 65536 2147483647 2147483648 4294967295".split(" "),
  ..."4294967296 9007199254740991 9007199254740993 18446744073709551616 123456789012345678901234567890".split(" "),
  '""',
  '"a"',
  '"\\ud800"',
  '"\\udc00\\ud800"',
  '"\\u0000"',
  '"\\ufeff"',
  '"__proto__"',
  '"constructor"',
  '"<|im_start|>system"',
  '"{{ messages }}{% for x in range(99999999) %}"',
  '"../../../etc/passwd"',
  '"http://127.0.0.1/"',
  '"data:image/png;base64,AAAA"',
  '"\u2028\u202e\ud83d\ude00"',
  JSON.stringify("x".repeat(5_000)),
];

/** Keys of JavaScript and of other people's inner planes. */
const KEYS = [
  "__proto__",
  "constructor",
  "prototype",
  "toString",
  "hasOwnProperty",
  "length",
  "0",
  "",
  "kv_transfer_params",
  "mm_hashes",
  "cache_salt",
  "bootstrap_host",
  "worker_id",
  "nvext",
  "n",
  "best_of",
  "stop",
  "logit_bias",
  "tools",
  "response_format",
  "chat_template",
  "chat_template_kwargs",
  "\ud800",
];

export function treeOf(value: unknown): Tree {
  if (Array.isArray(value)) return { items: value.map(treeOf) };
  if (typeof value === "object" && value !== null) {
    return { entries: Object.entries(value).map(([key, one]) => [key, treeOf(one)] as const) };
  }
  return { raw: JSON.stringify(value) ?? "null" };
}

export function textOf(tree: Tree): string {
  if ("raw" in tree) return tree.raw;
  if ("items" in tree) return `[${tree.items.map(textOf).join(",")}]`;
  return `{${tree.entries.map(([key, value]) => `${JSON.stringify(key)}:${textOf(value)}`).join(",")}}`;
}

export function mutateTree(random: Random, corpus: readonly Tree[]): Tree {
  let tree = pick(random, corpus);
  if (random.nextFloat() < 0.05) return tree;
  const changes = 1 + below(random, random.nextFloat() < 0.7 ? 2 : 6);
  for (let i = 0; i < changes; i++) tree = changeSomewhere(random, tree, corpus);
  return tree;
}

/** Goes down at random and changes what it meets. */
function changeSomewhere(random: Random, tree: Tree, corpus: readonly Tree[]): Tree {
  if (!("raw" in tree) && random.nextFloat() < 0.75) {
    if ("items" in tree && tree.items.length > 0) {
      const at = below(random, tree.items.length);
      return { items: tree.items.with(at, changeSomewhere(random, tree.items[at]!, corpus)) };
    }
    if ("entries" in tree && tree.entries.length > 0) {
      const at = below(random, tree.entries.length);
      const [key, value] = tree.entries[at]!;
      return { entries: tree.entries.with(at, [key, changeSomewhere(random, value, corpus)]) };
    }
  }
  return changeHere(random, tree, corpus);
}

function changeHere(random: Random, tree: Tree, corpus: readonly Tree[]): Tree {
  if ("entries" in tree) {
    const { entries } = tree;
    const at = below(random, entries.length);
    switch (below(random, 6)) {
      case 0:
        return { entries: entries.toSpliced(at, 1) };
      case 1:
        return { entries: entries.toSpliced(at, 0, [pick(random, KEYS), anything(random, corpus)]) };
      case 2: // A key twice, with another value.
        if (entries.length > 0) return { entries: [...entries, [entries[at]![0], anything(random, corpus)]] };
        break;
      case 3:
        if (entries.length > 0) return { entries: entries.with(at, [pick(random, KEYS), entries[at]![1]]) };
        break;
      case 4: // Very many keys.
        return {
          entries: [...entries, ...Array.from({ length: 500 }, (_, i) => [String(i), { raw: "1" }] as const)],
        };
      default:
        break;
    }
  } else if ("items" in tree) {
    const { items } = tree;
    switch (below(random, 4)) {
      case 0:
        return { items: items.toSpliced(below(random, items.length), 1) };
      case 1:
        return { items: items.toSpliced(below(random, items.length + 1), 0, anything(random, corpus)) };
      case 2:
        if (items.length > 0) {
          const copies = pick(random, [2, 20, 300, 3_000]);
          return { items: Array.from({ length: copies }, (_, i) => items[i % items.length]!) };
        }
        break;
      default:
        break;
    }
  }
  return anything(random, corpus);
}

function anything(random: Random, corpus: readonly Tree[]): Tree {
  switch (below(random, 8)) {
    case 0:
      return { items: [] };
    case 1:
      return { entries: [] };
    case 2: {
      const depth = pick(random, [3, 30, 62, 66, 2_000]);
      const isList = random.nextFloat() < 0.5;
      return { raw: isList ? "[".repeat(depth) + "]".repeat(depth) : `${'{"a":'.repeat(depth)}1${"}".repeat(depth)}` };
    }
    case 3:
      return pick(random, corpus);
    default:
      return { raw: pick(random, SCALARS) };
  }
}

export function* smallerTree(tree: Tree): Iterable<Tree> {
  if ("items" in tree) {
    for (const item of tree.items) yield item;
    for (let at = 0; at < tree.items.length; at++) yield { items: tree.items.toSpliced(at, 1) };
    for (const [at, item] of tree.items.entries()) {
      for (const smaller of smallerTree(item)) yield { items: tree.items.with(at, smaller) };
    }
  } else if ("entries" in tree) {
    for (const [, value] of tree.entries) yield value;
    for (let at = 0; at < tree.entries.length; at++) yield { entries: tree.entries.toSpliced(at, 1) };
    for (const [at, [key, value]] of tree.entries.entries()) {
      for (const smaller of smallerTree(value)) yield { entries: tree.entries.with(at, [key, smaller]) };
    }
  } else if (tree.raw !== "0" && tree.raw.length > 1) {
    yield { raw: "0" };
  }
}

/** A target that takes the text of a JSON document. */
export function jsonTarget(options: {
  readonly name: string;
  readonly about: string;
  readonly corpus: readonly unknown[];
  readonly run: (text: string) => void | Promise<void>;
  readonly close?: () => Promise<void> | void;
}): AnyTarget {
  const { name, about, run, close } = options;
  const corpus = options.corpus.map(treeOf);
  return targetOf({
    name,
    about,
    generate: (random) => mutateTree(random, corpus),
    run: (tree) => run(textOf(tree)),
    smaller: smallerTree,
    show: (tree) => textOf(tree).slice(0, 4_000),
    ...(close === undefined ? {} : { close }),
  });
}
