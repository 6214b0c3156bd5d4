export type { AnswerReader, AnswerSink, EngineDialect, EngineFacts, ScrapedLoad } from "./answer.ts";
export { EngineHttp, parseEngineUrl, type CallHandler, type HttpCall, type OpenCall } from "./engine-http.ts";
export { EngineProcess, type EngineCommand, type EngineExit } from "./engine-process.ts";
export { EngineServer, type EngineServerOptions } from "./engine-server.ts";
export type { ForeignEngineConfig, TokenizerSample } from "./foreign-config.ts";
export { EstimatedCache } from "./estimated-cache.ts";
export { ForeignEngine, type ForeignEngineOptions } from "./foreign-engine.ts";
export { ZmqKvFeed, rankEndpoint, type KvEndpoints, type KvFeed, type KvFeedOptions } from "./kv-feed.ts";
export { LogRing } from "./log-ring.ts";
export { MirroredBlocks } from "./mirrored-blocks.ts";
export { claimFreePorts, claimName, claimPort, type PortClaim } from "./port-claims.ts";
export { familiesWithPrefix, parsePrometheus, sumOf, type PrometheusSample } from "./prometheus-text.ts";
export { SseReader } from "./sse-reader.ts";
export { flagJson, flagValue, hasFlag } from "./flag-values.ts";
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
