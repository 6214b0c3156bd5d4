import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { describe, it } from "node:test";
import { isGone, ownHolder, parseHolder } from "./holder.ts";

const linuxOnly = process.platform === "linux" ? {} : { skip: "needs Linux's process table" };

describe("holder", () => {
  it("this process is not gone, quick or thorough", () => {
    const own = ownHolder();
    assert.equal(own.pid, process.pid);
    for (const thorough of [false, true]) assert.equal(isGone(own, own, thorough), false);
  });

  it("a process that ended is gone", linuxOnly, async () => {
    const child = spawn(process.execPath, ["-e", ""], { stdio: "ignore" });
    const { pid } = child;
    await once(child, "exit");
    const own = ownHolder();
    assert.equal(isGone({ ...own, pid: pid! }, own, false), true);
  });

  it("a process of another start time under the same pid is another process", linuxOnly, () => {
    const own = ownHolder();
    assert.ok(own.startTicks > 0);
    assert.equal(isGone({ ...own, startTicks: own.startTicks + 1 }, own, true), true);
    assert.equal(isGone({ ...own, startTicks: own.startTicks + 1 }, own, false), false);
    assert.equal(isGone({ ...own, startTicks: -1 }, own, true), false);
  });

  it("nothing is said about processes of another machine, or of an unknown one", () => {
    const own = ownHolder();
    assert.equal(isGone({ ...own, pid: 0x7fff_fffe, machine: "other" }, own, true), false);
    assert.equal(isGone({ ...own, pid: 0x7fff_fffe, machine: "" }, { ...own, machine: "" }, true), false);
  });

  it("what a file says is taken only when all of it makes sense", () => {
    const own = ownHolder();
    assert.deepEqual(parseHolder(JSON.parse(JSON.stringify(own))), own);
    const wrong = [undefined, null, 1, "x", {}, { ...own, pid: 0 }, { ...own, pid: -1 }, { ...own, pid: 1.5 }];
    wrong.push({ ...own, pid: 2 ** 31 }, { ...own, host: 1 }, { ...own, machine: null }, { ...own, startTicks: "1" });
    for (const value of wrong) assert.equal(parseHolder(value), undefined, JSON.stringify(value));
  });
});
