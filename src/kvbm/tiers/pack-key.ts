import { nextSequenceHash } from "../../tokens/index.ts";
import type { BlockIdentity } from "./block-identity.ts";

/**
 * The name of an object with consecutive blocks: where they begin and what is in them.
 *
 *     <depth of the first> . <sequence hash of its parent> . <local hash of each block>        all in hex, 16 digits a hash
 *
 * By the public recipe (tokens/) a block's sequence hash follows from its parent's and its own local hash, so a listing of
 * names tells each block with its whole identity. Two workers that store the same blocks choose the same name.
 */
/** The longest name has 153 signs: file systems take 255. */
export const MAX_PACK_BLOCKS = 8;
const NAME = /^([0-9a-f]{1,8})\.([0-9a-f]{16})\.((?:[0-9a-f]{16}){1,8})$/;

/** `run`: 1 to 8 blocks, each of which follows the one before it. */
export function packKey(run: readonly BlockIdentity[]): string {
  const { depth, parentLo, parentHi } = run[0]!;
  const locals = run.map(({ localLo, localHi }) => hex(localHi) + hex(localLo));
  return `${depth.toString(16)}.${hex(parentHi)}${hex(parentLo)}.${locals.join("")}`;
}

/** Undefined for a name of another make. */
export function blocksOfPackKey(name: string): BlockIdentity[] | undefined {
  const [, depthText, parent, locals] = NAME.exec(name) ?? [];
  if (depthText === undefined) return undefined;
  let depth = parseInt(depthText, 16);
  let [parentLo, parentHi] = halves(parent!, 0);
  const out = new Uint32Array(2);
  const blocks: BlockIdentity[] = [];
  for (let at = 0; at < locals!.length; at += 16, depth++) {
    const [localLo, localHi] = halves(locals!, at);
    if (depth === 0) out.set([localLo, localHi]);
    else nextSequenceHash(parentLo, parentHi, localLo, localHi, out, 0);
    const [lo, hi] = [out[0]!, out[1]!];
    blocks.push({ lo, hi, parentLo, parentHi, localLo, localHi, depth });
    [parentLo, parentHi] = [lo, hi];
  }
  return blocks;
}

function halves(text: string, at: number): [lo: number, hi: number] {
  return [parseInt(text.slice(at + 8, at + 16), 16), parseInt(text.slice(at, at + 8), 16)];
}

function hex(word: number): string {
  return (word >>> 0).toString(16).padStart(8, "0");
}
