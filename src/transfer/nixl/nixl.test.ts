import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { nixlForTests } from "../../../test/helpers/nixl.ts";
import { TransferAgent } from "../index.ts";
import { processBattery } from "../process.battery.ts";
import { assertReason, openPeers, transferBattery } from "../transfer.battery.ts";

/** The real NIXL library, over UCX's TCP: the path it has between hosts without special hardware. */
process.env["UCX_TLS"] = "tcp";

test("nixl: where it is not installed the error says what to do", async () => {
  const folder = await mkdtemp(join(tmpdir(), "dynamo-no-nixl-"));
  try {
    const started = TransferAgent.start({ name: "a", tcp: false, shm: false, nixl: { libraryFolder: folder } });
    await assert.rejects(started, (thrown) => {
      assertReason(thrown, "library-unavailable");
      assert.match((thrown as Error).message, /pip install nixl-cu12.*NIXL_PLUGIN_DIR/);
      return true;
    });
  } finally {
    await rm(folder, { recursive: true });
  }
});

const { libraryFolder, reason } = await nixlForTests();

if (libraryFolder === undefined) {
  test("nixl: the battery", (t) => t.skip(reason));
} else {
  const nixl = { libraryFolder };
  transferBattery({
    backend: "nixl",
    hasPeer: true,
    ownerChecks: false,
    anyRange: true,
    recallsWrites: true,
    open: (options) =>
      openPeers(options, (name, clock) => TransferAgent.start({ name, clock, shm: false, tcp: false, nixl }), true),
  });
  processBattery({ backend: "nixl", agent: { shm: false, tcp: false, nixl }, needsLivePeer: true });

  test("nixl: an idle agent leaves the core alone", async () => {
    const agent = await TransferAgent.start({ name: "idle", shm: false, tcp: false, nixl });
    try {
      // NIXL's own default takes 1.0 here. What is measured is a duration, so this test has to take one.
      const before = process.cpuUsage();
      const startMs = performance.now();
      await new Promise((resolve) => setTimeout(resolve, 1_500));
      const used = process.cpuUsage(before);
      const cores = (used.user + used.system) / 1_000 / (performance.now() - startMs);
      assert.ok(cores < 0.2, `${cores.toFixed(3)} cores`);
    } finally {
      await agent.close();
    }
  });
}
