import type { HfStep } from "./hf-tokenizer.ts";

/**
 * How text is cut before byte-level BPE, by the name a GGUF file gives it (`tokenizer.ggml.pre`). Each entry is the
 * pre-tokenizer of the models' own `tokenizer.json`; several names share one. The names are llama.cpp's.
 */
export interface PreTokenizer {
  readonly normalizer: HfStep | null;
  readonly preTokenizer: HfStep;
  readonly ignoreMerges: boolean;
  /** Used when the file does not say whether a prompt starts with the begin token. */
  readonly addBosByDefault: boolean;
}

export function preTokenizerOf(name: string): PreTokenizer | undefined {
  return BY_NAME.get(name);
}

const CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const TAIL = "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
/** GPT-4 style; digits in groups of one to three. */
const LLAMA3 = `${CONTRACTIONS}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|${TAIL}`;
/** The same with single digits. */
const QWEN2 = `${CONTRACTIONS}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|${TAIL}`;
const UPPER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]";
const LOWER = "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]";
/** GPT-4o's: words split where the case changes. */
const GPT4O =
  `[^\\r\\n\\p{L}\\p{N}]?${UPPER}*${LOWER}+${CONTRACTIONS}?|[^\\r\\n\\p{L}\\p{N}]?${UPPER}+${LOWER}*${CONTRACTIONS}?` +
  `|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|${TAIL}`;
const TEKKEN =
  `[^\\r\\n\\p{L}\\p{N}]?${UPPER}*${LOWER}+|[^\\r\\n\\p{L}\\p{N}]?${UPPER}+${LOWER}*` +
  `|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|${TAIL}`;

const GPT2_STEP: HfStep = { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true };
const BYTES_ONLY: HfStep = { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: false };
const DIGITS: HfStep = { type: "Digits", individual_digits: true };

function steps(...pretokenizers: HfStep[]): HfStep {
  return { type: "Sequence", pretokenizers };
}

function split(pattern: string): HfStep {
  return { type: "Split", pattern: { Regex: pattern }, behavior: "Isolated", invert: false };
}

function entry(preTokenizer: HfStep, other: Partial<PreTokenizer> = {}): PreTokenizer {
  return { normalizer: null, preTokenizer, ignoreMerges: false, addBosByDefault: false, ...other };
}

const gpt2 = entry(GPT2_STEP);
const singleDigits = entry(steps(DIGITS, GPT2_STEP));
const llama3 = entry(steps(split(LLAMA3), BYTES_ONLY), { ignoreMerges: true, addBosByDefault: true });
const qwen2 = entry(steps(split(QWEN2), BYTES_ONLY), { normalizer: { type: "NFC" } });
const stablelm2 = entry(steps(split(QWEN2), BYTES_ONLY));
const dbrx = entry(steps(split(LLAMA3), BYTES_ONLY));
const gpt4o = entry(steps(split(GPT4O), BYTES_ONLY));
const tekken = entry(steps(split(TEKKEN), BYTES_ONLY), { ignoreMerges: true, addBosByDefault: true });
/**
 * What llama.cpp does for files that name no kind: punctuation apart, then GPT-2's rule, then runs of digits, and those
 * in threes from the left.
 */
const unnamed = entry(
  steps(
    split("[\\p{P}\\$\\+<=>\\^~\\|]+"),
    split("'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)"),
    split("\\p{N}+"),
    split("[0-9][0-9][0-9]"),
    BYTES_ONLY,
  ),
);

const BY_NAME = new Map<string, PreTokenizer>([
  ["default", unnamed],
  ["gpt-2", gpt2],
  ["phi-2", gpt2],
  ["mpt", gpt2],
  ["olmo", gpt2],
  ["roberta-bpe", gpt2],
  ["smollm", singleDigits],
  ["starcoder", singleDigits],
  ["refact", singleDigits],
  ["command-r", singleDigits],
  ["codeshell", singleDigits],
  ["minerva-7b", singleDigits],
  ["llama-bpe", llama3],
  ["llama3", llama3],
  ["llama-v3", llama3],
  ["falcon3", llama3],
  ["smaug-bpe", dbrx],
  ["dbrx", dbrx],
  ["qwen2", qwen2],
  ["deepseek-r1-qwen", stablelm2],
  ["stablelm2", stablelm2],
  ["gpt-4o", gpt4o],
  ["llama4", gpt4o],
  ["tekken", tekken],
]);
