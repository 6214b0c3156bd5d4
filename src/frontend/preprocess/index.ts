export { Preprocessor, type ChatPrompt, type PromptBounds } from "./preprocessor.ts";
export { loadTokenizer, type EncodeOptions, type Tokenizer } from "./tokenizer.ts";
export { ChatTemplate, TEMPLATE_LIMITS, type TemplateInput, type TemplateSpecials } from "./chat-template.ts";
export { ENCODE_LIMITS } from "./encode-limits.ts";
export type { TextCacheUse } from "./text-cache.ts";
