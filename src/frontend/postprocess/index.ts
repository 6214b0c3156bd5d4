export { Detokenizer } from "./detokenizer.ts";
export { StopMatcher } from "./stop-matcher.ts";
