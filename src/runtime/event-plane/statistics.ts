/** What one plane object has done so far; plain counters, read at scrape time by whoever exports them. */
export interface EventPlaneStatistics {
  published: number;
  /** Events handed to handlers. */
  delivered: number;
  duplicates: number;
  /** Calls of `onGap`. */
  gaps: number;
  /** Events reported lost. */
  lost: number;
  /** Replays asked, and those not answered in time. */
  replaysAsked: number;
  replaysFailed: number;
  /** Events dropped because a queue or a hold-back buffer was full; a replay or a gap follows. */
  overflows: number;
  /** Frames and records from outside that break the format. */
  malformed: number;
  /** Exceptions out of handlers. */
  handlerErrors: number;
}

export function newStatistics(): EventPlaneStatistics {
  return {
    published: 0,
    delivered: 0,
    duplicates: 0,
    gaps: 0,
    lost: 0,
    replaysAsked: 0,
    replaysFailed: 0,
    overflows: 0,
    malformed: 0,
    handlerErrors: 0,
  };
}
