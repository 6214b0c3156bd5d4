import type { TimingModel } from "./timing.ts";

export interface SpeedupOptions {
  /** Divides all times. 0 = no time passes at all: for races and for load on everything but the engine. @default 1 */
  readonly speedupRatio?: number;
  /** Divides decode times once more. @default 1 */
  readonly decodeSpeedupRatio?: number;
}

/** A model of hardware so many times faster. */
export function withSpeedup(model: TimingModel, options: SpeedupOptions): TimingModel {
  const { speedupRatio = 1, decodeSpeedupRatio = 1 } = options;
  if (speedupRatio === 1 && decodeSpeedupRatio === 1) return model;
  const prefillFactor = speedupRatio === 0 ? 0 : 1 / speedupRatio;
  const decodeFactor = decodeSpeedupRatio === 0 ? 0 : prefillFactor / decodeSpeedupRatio;
  return {
    prefillMs: (work) => model.prefillMs(work) * prefillFactor,
    decodeMs: (work) => model.decodeMs(work) * decodeFactor,
  };
}
