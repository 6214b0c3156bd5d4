export type {
  AnswerReader,
  AnswerSink,
  CacheEstimate,
  DialectCall,
  EngineDialect,
  EngineFacts,
  ScrapedLoad,
  TransferDialect,
} from "./answer.ts";
export { flagJson, flagValue, hasFlag, kvEndpointsOf, reachableHost } from "./engine-flags.ts";
export {
  EngineHttp,
  parseEngineUrl,
  type AnswerHeaders,
  type CallHandler,
  type HttpCall,
  type OpenCall,
} from "./engine-http.ts";
export { EngineProcess, type EngineCommand, type EngineExit } from "./engine-process.ts";
export { EngineQuestions, FIRST_ANSWER_MS, firstLine, isBeforeVersion, messageOf } from "./engine-questions.ts";
export { EngineServer, type EngineServerOptions } from "./engine-server.ts";
export { errorMessageOf, retryAfterMsOf } from "./error-body.ts";
export type { EngineTokenizer, ForeignEngineConfig, TokenizerSample } from "./foreign-config.ts";
export { EstimatedCache } from "./estimated-cache.ts";
export { ForeignEngine, type ForeignEngineOptions } from "./foreign-engine.ts";
export { ZmqKvFeed, rankEndpoint, type KvEndpoints, type KvFeed, type KvFeedOptions } from "./kv-feed.ts";
export { LogRing } from "./log-ring.ts";
export { MirroredBlocks } from "./mirrored-blocks.ts";
export { attachEngine, launchEngine, type ForeignPlace, type LaunchPorts, type LaunchedPlace } from "./open-engine.ts";
export { claimFreePorts, claimName, claimPort, type PortClaim } from "./port-claims.ts";
export { PolledKvFeed } from "./polled-kv-feed.ts";
export { familiesWithPrefix, parsePrometheus, sumOf, type PrometheusSample } from "./prometheus-text.ts";
export { SlotCache } from "./slot-cache.ts";
export { SseReader } from "./sse-reader.ts";
export { TextTokens, TokenBytes } from "./text-tokens.ts";
export {
  KNOWN_BAD,
  knownBad,
  memoryNeed,
  versionRange,
  type GpuFacts,
  type KnownBad,
  type KnownBadFinding,
  type MachineFacts,
  type ModelFacts,
  type Situation,
} from "./known-bad.ts";
export { machineFacts, modelFacts } from "./situation-facts.ts";
export { isBefore, parseVersion } from "./version-number.ts";
