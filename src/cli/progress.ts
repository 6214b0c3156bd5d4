import type { PullProgress } from "../model/index.ts";
import type { Clock } from "../std/index.ts";

/**
 * Shows a pull: a bar that redraws itself on a terminal, else a line every few seconds, so that logs stay readable.
 */
export interface ProgressOutput {
  readonly write: (text: string) => void;
  readonly isTerminal: boolean;
  readonly columns: number;
  readonly clock: Clock;
}

const BAR_EVERY_MS = 100;
const LINE_EVERY_MS = 5_000;

export class PullDisplay {
  readonly #output: ProgressOutput;
  #shownMs = -Infinity;
  #source = "";
  #startMs = 0;
  #startBytes = 0;
  #barShown = false;
  #checking = false;

  constructor(output: ProgressOutput) {
    this.#output = output;
  }

  update(progress: PullProgress): void {
    const { model, source, phase, gaveUp, receivedBytes } = progress;
    const nowMs = this.#output.clock.monotonicMs();
    if (gaveUp !== undefined) return this.#line(`${source}: ${gaveUp}`);
    if (phase === "waiting") return this.#line(`${model}: ${source} is pulling it; waiting`);
    if (phase === "checking") {
      if (!this.#checking) this.#line(`${model}: checking`);
      this.#checking = true;
      return;
    }
    this.#checking = false;
    if (source !== this.#source) {
      this.#source = source;
      [this.#startMs, this.#startBytes, this.#shownMs] = [nowMs, receivedBytes, nowMs];
      return this.#line(`${model}: pulling from ${source}`);
    }
    // A resumed download begins with what is there already; that is not speed.
    if (this.#startBytes === 0 && nowMs - this.#startMs < 50) this.#startBytes = receivedBytes;
    if (nowMs - this.#shownMs < (this.#output.isTerminal ? BAR_EVERY_MS : LINE_EVERY_MS)) return;
    this.#shownMs = nowMs;
    const text = this.#amount(progress, nowMs);
    if (!this.#output.isTerminal) return this.#line(`${model}: ${text}`);
    this.#output.write(`\r\u001b[K${bar(progress, Math.max(10, Math.min(40, this.#output.columns - 50)))} ${text}`);
    this.#barShown = true;
  }

  /** Leaves a clean line behind. */
  close(): void {
    if (this.#barShown) this.#output.write("\r\u001b[K");
    this.#barShown = false;
  }

  #line(text: string): void {
    this.close();
    this.#output.write(`${text}\n`);
  }

  #amount({ receivedBytes, totalBytes }: PullProgress, nowMs: number): string {
    const seconds = (nowMs - this.#startMs) / 1_000;
    const speed = seconds > 0 ? (receivedBytes - this.#startBytes) / seconds : 0;
    const of =
      totalBytes === undefined
        ? ""
        : ` of ${megabytes(totalBytes)} (${Math.floor((100 * receivedBytes) / totalBytes)} %)`;
    const left =
      totalBytes !== undefined && speed > 0 ? `, ${Math.ceil((totalBytes - receivedBytes) / speed)} s left` : "";
    return `${megabytes(receivedBytes)}${of}, ${megabytes(speed)}/s${left}`;
  }
}

function bar({ receivedBytes, totalBytes }: PullProgress, width: number): string {
  const filled = totalBytes === undefined ? 0 : Math.floor((width * receivedBytes) / totalBytes);
  return `[${"#".repeat(filled)}${".".repeat(width - filled)}]`;
}

function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}
