/**
 * The four kinds of characters that the split patterns of byte-level tokenizers tell apart, as a table by code unit. The
 * table is built once per process from the same Unicode properties that the patterns name (2 ms for the first plane, the
 * others when a character of theirs first comes), so that it cannot drift from the regular expressions.
 */
export const OTHER = 0;
/** \p{L} */
export const LETTER = 1;
/** \p{N} */
export const NUMBER = 2;
/** \p{White_Space} without the next kind; Oniguruma's \s, which unlike JavaScript's has U+0085 and has not U+FEFF. */
export const SPACE = 3;
/** \r and \n */
export const NEWLINE = 4;
/** In the first plane's table only: look at the pair. */
export const SURROGATE = 5;

const PLANE_SIZE = 0x10000;
const planes: (Uint8Array | undefined)[] = Array.from<Uint8Array | undefined>({ length: 17 });

/** Class by code unit; surrogates are `SURROGATE`. */
export const UNIT_CLASS: Uint8Array = buildPlane(0);

/** Class of the surrogate pair at `index`. The text is well-formed, so there always is a second half. */
export function pairClass(units: Uint16Array, index: number): number {
  const high = units[index] as number;
  const low = units[index + 1] as number;
  const codePoint = ((high - 0xd800) << 10) + (low - 0xdc00) + 0x10000;
  const plane = (planes[codePoint >>> 16] ??= buildPlane(codePoint >>> 16));
  return plane[codePoint & 0xffff] as number;
}

function buildPlane(plane: number): Uint8Array {
  const unitsPerCharacter = plane === 0 ? 1 : 2;
  const units = new Uint16Array(PLANE_SIZE * unitsPerCharacter);
  for (let index = 0; index < PLANE_SIZE; index++) {
    if (plane === 0) {
      units[index] = index;
    } else {
      const offset = plane * PLANE_SIZE + index - 0x10000;
      units[index * 2] = 0xd800 + (offset >>> 10);
      units[index * 2 + 1] = 0xdc00 + (offset & 0x3ff);
    }
  }
  const text = Buffer.from(units.buffer).toString("utf16le");
  const table = new Uint8Array(PLANE_SIZE);
  const mark = (pattern: RegExp, kind: number): void => {
    for (const match of text.matchAll(pattern)) {
      table.fill(kind, match.index / unitsPerCharacter, (match.index + match[0].length) / unitsPerCharacter);
    }
  };
  mark(/\p{L}+/gu, LETTER);
  mark(/\p{N}+/gu, NUMBER);
  mark(/\p{White_Space}+/gu, SPACE);
  if (plane === 0) {
    table[0x0a] = NEWLINE;
    table[0x0d] = NEWLINE;
    table.fill(SURROGATE, 0xd800, 0xe000);
  }
  return table;
}
