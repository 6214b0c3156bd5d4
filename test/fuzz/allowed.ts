import { DynamoError, type Reason } from "../../src/errors/index.ts";

/** Runs it; an error of the catalogue with one of these reasons is an answer, anything else is passed on. */
export function allowing<Value>(reasons: readonly Reason[], run: () => Value): Value | undefined {
  try {
    return run();
  } catch (thrown) {
    return allowed(reasons, thrown);
  }
}

export async function allowingLater<Value>(
  reasons: readonly Reason[],
  run: () => Promise<Value>,
): Promise<Value | undefined> {
  try {
    return await run();
  } catch (thrown) {
    return allowed(reasons, thrown);
  }
}

function allowed(reasons: readonly Reason[], thrown: unknown): undefined {
  if (!(thrown instanceof DynamoError) || !reasons.includes(thrown.reason)) throw thrown;
  // What a client reads is a sentence and not somebody's stack.
  if (thrown.publicMessage === "" || thrown.publicMessage.length > 64 * 1024 || /\n\s+at /.test(thrown.publicMessage)) {
    throw new Error(`an error that is not fit for a client: ${thrown.publicMessage.slice(0, 200)}`, { cause: thrown });
  }
  return undefined;
}
