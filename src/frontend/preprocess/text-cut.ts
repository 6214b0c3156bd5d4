import { LETTER, UNIT_CLASS } from "./character-class.ts";

/**
 * Where a text may be cut so that the tokens of the parts are those of the whole, known from the two units at the cut
 * alone: between a letter and one of a few characters that end every run of letters.
 *
 * Why that is safe, for the scanners of `pre-tokenizer.ts`: a piece of theirs always ends at such a place, what comes
 * before it is scanned alike whether the text ends there or goes on (no run, contraction or look-ahead reaches past it),
 * and a scan that begins there never looks back. And for NFC: none of the characters composes with what stands before or
 * after it, and the letter is one that NFC leaves alone. `text-cut.test.ts` tries all of it.
 */
export const CUT_BEFORE: readonly string[] = [" ", "\n", ",", ".", "\u3001", "\u3002", "\uff0c"];

const CUT_UNITS: ReadonlySet<number> = new Set(CUT_BEFORE.map((character) => character.charCodeAt(0)));

/** The first place to cut in `from .. to`, or -1. `from` is at least 1, `to` at most the text's length. */
export function findCut(text: string, from: number, to: number): number {
  for (let index = from; index < to; index++) {
    if (CUT_UNITS.has(text.charCodeAt(index)) && isLastingLetter(text.charCodeAt(index - 1))) return index;
  }
  return -1;
}

function isLastingLetter(unit: number): boolean {
  if (UNIT_CLASS[unit] !== LETTER) return false;
  if (unit < 0x80) return true;
  const letter = String.fromCharCode(unit);
  return letter.normalize("NFC") === letter;
}
