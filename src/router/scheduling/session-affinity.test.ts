import assert from "node:assert/strict";
import { test } from "node:test";
import { ManualClock } from "../../std/index.ts";
import { SessionAffinity } from "./session-affinity.ts";

const A = { instanceId: "a", dpRank: 0 };
const B = { instanceId: "b", dpRank: 1 };

function aSetup(limit = 10) {
  const clock = new ManualClock();
  return { clock, sessions: new SessionAffinity({ clock, ttlMs: 1_000, limit }) };
}

test("session affinity: a binding lives while its requests run and for the time to live after the last one", () => {
  const { clock, sessions } = aSetup();
  const first = sessions.lease("s", A);
  const second = sessions.lease("s", A);
  clock.advance(60_000);
  assert.equal(sessions.find("s")?.instanceId, "a");
  sessions.release("s", first);
  clock.advance(60_000);
  sessions.release("s", second);
  clock.advance(999);
  assert.equal(sessions.find("s")?.instanceId, "a");
  clock.advance(1);
  assert.equal(sessions.find("s"), undefined);
  assert.equal(sessions.size, 0);
});

test("session affinity: an invalidated session is bound anew, and the old lease's end does not touch the new one", () => {
  const { sessions } = aSetup();
  const old = sessions.lease("s", A);
  sessions.invalidate("s");
  const lease = sessions.lease("s", B);
  sessions.release("s", old);
  assert.deepEqual([sessions.find("s")?.instanceId, sessions.find("s")?.dpRank], ["b", 1]);
  sessions.release("s", lease);
});

test("session affinity: above the limit the one that was idle longest goes", () => {
  const { clock, sessions } = aSetup(2);
  for (const id of ["one", "two"]) sessions.release(id, sessions.lease(id, A));
  clock.advance(10);
  sessions.release("one", sessions.lease("one", A));
  sessions.release("three", sessions.lease("three", A));
  assert.deepEqual(
    ["one", "two", "three"].map((id) => sessions.find(id) !== undefined),
    [true, false, true],
  );
  assert.equal(sessions.size, 2);
});
