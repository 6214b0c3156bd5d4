import assert from "node:assert/strict";
import { mkdtemp, readFile, readdir, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, it } from "node:test";
import { silentLogger } from "../../observability/index.ts";
import { ManualClock } from "../../std/index.ts";
import { FileDiscovery } from "./file.ts";
import { FileView } from "./file-view.ts";
import { ownHolder } from "./holder.ts";
import { StoreFolder } from "./store-folder.ts";

describe("file view", () => {
  it("leaves out what is over its limit, says so, and takes it in when there is room again", async () => {
    const root = await mkdtemp(join(tmpdir(), "discovery-"));
    const clock = new ManualClock();
    const writer = new FileDiscovery({ root, clock });
    try {
      const folder = new StoreFolder(root);
      const changed: string[] = [];
      const view = new FileView({
        folder,
        clock,
        logger: silentLogger,
        own: ownHolder(),
        onChanged: (key) => changed.push(key),
        maxEntries: 3,
      });
      const lease = await writer.openLease();
      for (const key of ["a", "b", "c", "d", "e"]) await lease.put(key, key);
      await view.refresh({ relist: true, sweep: false });
      assert.equal(view.table.size, 3);
      assert.equal(view.trouble, "more than 3 entries: 2 left out");
      const [first] = view.table.keys();
      await lease.put(first!, "changed");
      await view.refresh({ relist: false, sweep: false });
      assert.equal(view.table.get(first!)?.entry.value, "changed", "a change needs no more room");
      for (const key of [...view.table.keys()].slice(0, 2)) await lease.delete(key);
      await view.refresh({ relist: true, sweep: false });
      await view.refresh({ relist: true, sweep: false });
      assert.equal(view.table.size, 3);
      assert.equal(view.trouble, undefined);
      assert.deepEqual(new Set(changed), new Set(["a", "b", "c", "d", "e"]));
    } finally {
      await writer.close();
      await rm(root, { recursive: true });
    }
  });

  it("keeps keys whose files vanish without a word, as in a recursive delete, until two heartbeats did not mend it", async () => {
    const root = await mkdtemp(join(tmpdir(), "discovery-"));
    // The holder's time stands still: its renewals are played here, and its own ones would come in between.
    const clock = new ManualClock();
    const writer = new FileDiscovery({ root, clock: new ManualClock() });
    try {
      const folder = new StoreFolder(root);
      const options = { folder, clock, logger: silentLogger, own: ownHolder() };
      const gone: string[] = [];
      const view = new FileView({
        ...options,
        onChanged: (key, stored) => {
          if (stored === undefined) gone.push(key);
        },
      });
      const lease = await writer.openLease();
      await lease.put("a", 1);
      await lease.put("b", 2);
      await view.refresh({ relist: false, sweep: false });
      await lease.delete("b");
      await view.refresh({ relist: false, sweep: false });
      assert.deepEqual(gone, ["b"], "what the log tells is believed at once");
      const path = join(root, "leases", lease.id);
      const [file] = (await readdir(path)).filter((name) => name !== "lease");
      const content = await readFile(join(path, file!));
      await rm(join(path, file!));
      const look = async (): Promise<void> => {
        clock.advance(1_000);
        await view.refresh({ relist: true, sweep: false });
      };
      await look();
      await look();
      assert.deepEqual(gone, ["b"]);
      // The holder's renewal writes it again.
      await writeFile(join(path, file!), content);
      assert.ok(await folder.beat(lease.id, 1));
      await look();
      await rm(join(path, file!));
      await look();
      assert.ok(await folder.beat(lease.id, 2));
      await look();
      assert.deepEqual(gone, ["b"]);
      assert.ok(await folder.beat(lease.id, 3));
      await look();
      assert.deepEqual(gone, ["b", "a"], "twice renewed and not mended: it was meant");
    } finally {
      await writer.close();
      await rm(root, { recursive: true });
    }
  });
});
