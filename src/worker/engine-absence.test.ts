import assert from "node:assert/strict";
import { test } from "node:test";
import type { EngineInfo } from "../engines/index.ts";
import { DynamoError } from "../errors/index.ts";
import { EngineAbsence } from "./engine-absence.ts";

const INFO = { engine: "test" } as EngineInfo;
const GONE = new DynamoError("engine-stopped", "gone");
const settled = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

function watched(comeBack: () => Promise<void> = () => Promise.resolve()) {
  const log: string[] = [];
  const absence = new EngineAbsence((error) => log.push(`failed: ${error.publicMessage}`));
  const serve = (): void =>
    absence.serve({
      leave: async () => {
        await settled();
        log.push("left");
      },
      comeBack: async () => {
        await comeBack();
        log.push("back");
      },
    });
  return { absence, log, serve };
}

test("an engine that goes before its worker serves fails the start", () => {
  const { absence, log } = watched();
  absence.begin(GONE);
  assert.deepEqual(log, ["failed: gone"]);
});

test("leaving and coming back are done in order, however fast the engine is", async () => {
  const { absence, log, serve } = watched();
  serve();
  absence.begin(GONE);
  assert.equal(absence.isAbsent, true);
  absence.end(INFO);
  absence.begin(GONE);
  absence.end(INFO);
  assert.equal(absence.isAbsent, false);
  for (let i = 0; i < 10; i++) await settled();
  assert.deepEqual(log, ["left", "back", "left", "back"]);
});

test("a come-back that fails ends the worker; not while the engine is away again", async () => {
  const { absence, log, serve } = watched(() => Promise.reject(new DynamoError("engine-failed", "no answer")));
  serve();
  absence.begin(GONE);
  absence.end(INFO);
  absence.begin(GONE);
  for (let i = 0; i < 10; i++) await settled();
  assert.deepEqual(log, ["left", "left"]);
  absence.end(INFO);
  for (let i = 0; i < 10; i++) await settled();
  assert.deepEqual(log, ["left", "left", "failed: no answer"]);
});
