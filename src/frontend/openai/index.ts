export type { AnswerDetails } from "./answer-parts.ts";
export { ChatStreamWriter, ChatWholeWriter } from "./chat-writer.ts";
export { CompletionStreamWriter, CompletionWholeWriter } from "./completion-writer.ts";
export { errorBody, errorHeaders, errorMetricType, errorStatus } from "./errors.ts";
export { CHAT_FIELD_NAMES, readChatRequest } from "./validate-chat.ts";
export { COMPLETION_FIELD_NAMES, readCompletionRequest } from "./validate-completion.ts";
export { openApiRoute } from "./openapi-route.ts";
export { readPriority, readStrictPriority, readTimeout, type ExtraField, type Nvext, type WithNvext } from "./nvext.ts";
export {
  invalidField,
  isObject,
  readNumber,
  readString,
  refuseUnknown,
  unsupportedField,
  type JsonObject,
} from "./fields.ts";
