import { parentPort, workerData } from "node:worker_threads";
import type { HostMessage, ThreadMessage } from "./messages.ts";

/** A thread of the host's tests that does one thing wrong: see `host.test.ts`. */
const { behaviour, index } = workerData as { readonly behaviour: string; readonly index: number };
const tell = (message: ThreadMessage): void => parentPort!.postMessage(message);
const isBad = index === 1;

parentPort!.on("message", (message: HostMessage) => {
  if (message.type === "listen") {
    if (isBad && behaviour === "fails") {
      tell({ type: "failed", reason: "address-in-use", message: "the address is taken", diagnostic: undefined });
      parentPort!.close();
      return;
    }
    tell({ type: "ready", port: message.port === 0 ? 12_345 : message.port });
    if (isBad && behaviour === "throws") setImmediate(() => { throw new Error("boom"); }); // prettier-ignore
    if (isBad && behaviour === "exits") setImmediate(() => process.exit(0));
    if (!isBad && behaviour === "asks") tell({ type: "ask", id: 7, question: { type: "explain", requestId: "r" } });
  }
  // The one that is asked stays silent; the one that asked says what it was answered, as its failure.
  if (message.type === "answers") {
    const text = message.answers === undefined ? "no answer in time" : JSON.stringify(message.answers);
    tell({ type: "failed", reason: "request-deadline", message: text, diagnostic: undefined });
  }
  if (message.type === "stop" || message.type === "drain") {
    if (!(isBad && behaviour === "stays")) parentPort!.close();
  }
});
