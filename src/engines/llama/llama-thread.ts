import { setImmediate as nextTurn } from "node:timers/promises";
import { parentPort, receiveMessageOnPort, workerData, type MessagePort } from "node:worker_threads";
import { DynamoError, toDynamoError } from "../../errors/index.ts";
import { systemClock, systemRandom } from "../../std/index.ts";
import type { EngineInfo } from "../index.ts";
import { BlockFollowers } from "./block-followers.ts";
import { EngineLoop } from "./engine-loop.ts";
import { LlamaContext, MAX_SEQUENCE_IDS } from "./llama-context.ts";
import { LoadBoard, type Command, type PlainError, type Reply, type Report, type ThreadData } from "./messages.ts";

/**
 * The engine's thread: native calls block here and nowhere else. It runs steps back to back while there is work, looks
 * for commands between two steps without giving control away, and sleeps on a shared counter when idle: no CPU, awake
 * within tens of microseconds. Its event loop turns now and then so that the runtime can tidy up.
 */
const STEPS_PER_TURN = 64;

async function main(port: MessagePort, data: ThreadData): Promise<void> {
  const board = new LoadBoard(data.load);
  const wake = new Int32Array(data.wake);
  const report = (message: Report, transfer: ArrayBuffer[] = []): void => port.postMessage(message, transfer);

  const model = openModel(data);
  try {
    const { loop, info } = createLoop(model, data);
    const followers = new BlockFollowers(loop);
    board.write(loop.load());
    report({ type: "started", info, log: model.startLog });
    // Lines that other threads logged while this one captured the library's log arrive in this turn.
    await nextTurn();

    for (let stepsInTurn = 0; ;) {
      // Read before the port: what is posted after this changes the counter, so the sleep below cannot miss it.
      const seen = Atomics.load(wake, 0);
      const replies: Replies = [];
      const mustStop = handleCommands(port, loop, followers, replies);
      if (mustStop) loop.failAll(new DynamoError("engine-stopped", "the engine was stopped"));
      else if (loop.hasWork) loop.step();
      board.write(loop.load());
      for (const { id, data } of followers.take()) report({ type: "blocks", callId: id, data }, [data.buffer]);
      reportStep(loop, report);
      for (const reply of replies) report(reply.report, reply.transfer);
      if (mustStop) break;
      if (loop.hasWork) {
        if (++stepsInTurn < STEPS_PER_TURN) continue;
      } else {
        await nextTurn();
        Atomics.wait(wake, 0, seen);
      }
      stepsInTurn = 0;
      await nextTurn();
    }
  } finally {
    model.close();
  }
}

/** An eighth of the cache, so that few of its blocks are gone through before the next epoch; see block-cache.ts. */
function spareBlocksOf(totalBlocks: number): number {
  return Math.max(4, Math.ceil(totalBlocks / 8));
}

function openModel({ config }: ThreadData): LlamaContext {
  const totalBlocks = Math.floor(config.kvCacheTokens / config.blockSizeTokens);
  return new LlamaContext({
    modelPath: config.modelPath,
    cells: (totalBlocks + spareBlocksOf(totalBlocks)) * config.blockSizeTokens,
    batchInvariant: config.batchInvariant ?? true,
    maxBatchedTokens: config.maxBatchedTokens,
    maxLogitRows: MAX_SEQUENCE_IDS,
    sequenceIds: MAX_SEQUENCE_IDS,
    threads: config.threads,
  });
}

function createLoop(
  model: LlamaContext,
  { config, maxWaitingRequests }: ThreadData,
): { loop: EngineLoop; info: EngineInfo } {
  const { blockSizeTokens, maxSequences, maxBatchedTokens } = config;
  const totalBlocks = Math.floor(config.kvCacheTokens / blockSizeTokens);
  const wanted = config.contextLength === 0 ? model.trainedContextLength : config.contextLength;
  const contextLength = Math.min(wanted, model.trainedContextLength, totalBlocks * blockSizeTokens);
  const loop = new EngineLoop(model, {
    contextLength,
    totalBlocks,
    blockSizeTokens,
    maxSequences,
    maxBatchedTokens,
    maxWaitingRequests,
    sequenceIds: MAX_SEQUENCE_IDS,
    extraLogitRows: MAX_SEQUENCE_IDS - maxSequences,
    spareBlocks: spareBlocksOf(totalBlocks),
    keepsOrder: config.batchInvariant ?? true,
    clock: systemClock,
    random: systemRandom,
  });
  const info: EngineInfo = {
    engine: "llama",
    engineVersion: model.libraryVersion,
    contextLength,
    blockSizeTokens,
    totalBlocks,
    maxSequences,
    maxBatchedTokens,
    dataParallelSize: 1,
    vocabularySize: model.vocabularySize,
    blockBytes: loop.blockBytes,
  };
  return { loop, info };
}

type SendReport = (message: Report, transfer?: ArrayBuffer[]) => void;

/** Answers to calls; sent after the events and the load that they changed. */
type Replies = { readonly report: Report; readonly transfer: ArrayBuffer[] }[];

/** Takes everything that has arrived; true when asked to stop. */
function handleCommands(port: MessagePort, loop: EngineLoop, followers: BlockFollowers, replies: Replies): boolean {
  for (;;) {
    const received = receiveMessageOnPort(port) as { message: Command[] } | undefined;
    if (received === undefined) return false;
    for (const command of received.message) {
      if (command.type === "stop") return true;
      if (command.type === "follow") followers.add(command.callId, command.sequenceHashes);
      else if (command.type === "unfollow") followers.remove(command.callId);
      else handleCommand(command, loop, replies);
    }
  }
}

type LoopCommand = Exclude<Command, { type: "stop" | "follow" | "unfollow" }>;

function handleCommand(command: LoopCommand, loop: EngineLoop, replies: Replies): void {
  switch (command.type) {
    case "submit":
      return loop.submit(command.streamId, command.request);
    case "abort":
      return loop.abort(command.streamId);
    case "clear":
      return answer(command.callId, replies, () => loop.clearBlocks());
    case "count":
      return answer(command.callId, replies, () => loop.countBlocks(command.sequenceHashes));
    case "export":
      return answer(command.callId, replies, () => loop.exportBlocks(command.sequenceHashes));
    case "import":
      return answer(command.callId, replies, () => loop.importBlocks(command.blocks));
    case "attach":
      return loop.attach(command.memory);
    case "copy-out":
      return answer(command.callId, replies, () => loop.copyOut(command.sequenceHashes, command.slots));
    case "copy-in":
      return answer(command.callId, replies, () => loop.copyIn(command.blocks));
  }
}

function answer(callId: number, replies: Replies, call: () => Reply): void {
  try {
    const value = call();
    const isExport = typeof value === "object" && "data" in value;
    const transfer = isExport ? [value.data.buffer as ArrayBuffer] : [];
    replies.push({ report: { type: "reply", callId, value }, transfer });
  } catch (thrown) {
    // A refused argument is the caller's; anything else means that the cache can no longer be trusted.
    if (!(thrown instanceof DynamoError)) throw thrown;
    replies.push({ report: { type: "call-failed", callId, error: plainError(thrown) }, transfer: [] });
  }
}

function reportStep(loop: EngineLoop, report: SendReport): void {
  const events = loop.takeEvents();
  const step = loop.takeStep();
  if (step === undefined && events.length === 0) return;
  report({ type: "step", step, events }, step === undefined ? [] : [step.buffer]);
}

function plainError(error: DynamoError): PlainError {
  const { reason, publicMessage, diagnostic } = error;
  return { reason, publicMessage, options: diagnostic === undefined ? {} : { diagnostic } };
}

const port = parentPort;
if (port !== null) {
  let error: PlainError | undefined;
  try {
    await main(port, workerData as ThreadData);
  } catch (thrown) {
    error = plainError(toDynamoError(thrown, "engine-failed"));
  }
  port.postMessage({ type: "ended", error } satisfies Report);
}
