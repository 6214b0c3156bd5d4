import type { EngineInfo } from "../engines/index.ts";
import { toDynamoError, type DynamoError } from "../errors/index.ts";

/**
 * While an engine that is a process of its own is away (it crashed and is started again, somebody restarted it), its worker
 * is not in discovery: nobody is sent here to be refused. Leaving and coming back are done one after the other, however fast
 * the engine comes and goes; a come-back that fails takes the worker down, as at its start.
 */
export interface AbsenceSteps {
  readonly leave: () => Promise<void>;
  readonly comeBack: (info: EngineInfo) => Promise<void>;
}

export class EngineAbsence {
  readonly #onFailed: (error: DynamoError) => void;
  #steps: AbsenceSteps | undefined;
  #isAbsent = false;
  #last: Promise<void> = Promise.resolve();

  constructor(onFailed: (error: DynamoError) => void) {
    this.#onFailed = onFailed;
  }

  get isAbsent(): boolean {
    return this.#isAbsent;
  }

  /** The worker is registered from now on. */
  serve(steps: AbsenceSteps): void {
    this.#steps = steps;
  }

  begin(error: DynamoError): void {
    // Before it served, the start fails by itself: with this reason, not with that of the request that tried it.
    if (this.#steps === undefined) return this.#onFailed(error);
    this.#isAbsent = true;
    this.#do(this.#steps.leave);
  }

  end(info: EngineInfo): void {
    const steps = this.#steps;
    if (steps === undefined) return;
    this.#isAbsent = false;
    this.#do(() => steps.comeBack(info));
  }

  #do(step: () => Promise<void>): void {
    this.#last = this.#last.then(step).catch((thrown: unknown) => {
      // It went away again meanwhile: the next time will do.
      if (!this.#isAbsent) this.#onFailed(toDynamoError(thrown));
    });
  }
}
