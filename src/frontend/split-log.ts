import type { SplitStage, SplitView } from "./split-stage.ts";

/** How the last choices were split, by request, for explanations: as many as the router keeps decisions of. */
const LIMIT = 4_096;

export class SplitLog {
  /** In the order they came. */
  readonly #stages = new Map<string, SplitStage[]>();
  #count = 0;

  add(requestId: string, stage: SplitStage): void {
    const known = this.#stages.get(requestId);
    if (known === undefined) this.#stages.set(requestId, [stage]);
    else known.push(stage);
    this.#count++;
    for (const [oldest, stages] of this.#stages) {
      if (this.#count <= LIMIT) break;
      this.#stages.delete(oldest);
      this.#count -= stages.length;
    }
  }

  /** One per choice, oldest first. */
  find(requestId: string): SplitView[] {
    return (this.#stages.get(requestId) ?? []).map((stage) => stage.view());
  }
}
