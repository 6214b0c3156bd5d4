/**
 * A process of its own that holds a lease, for the fault tests: `node file-holder.fixture.ts <root> <ttlMs> <key>...`
 * Prints its lease id when its keys are there, then holds them until it is killed or its input ends.
 */
import { FileDiscovery } from "./file.ts";

const [root, ttlMs, ...keys] = process.argv.slice(2);
const discovery = new FileDiscovery({ root: root! });
const lease = await discovery.openLease({ ttlMs: Number(ttlMs) });
for (const key of keys) await lease.put(key, { pid: process.pid });
process.stdout.write(`${lease.id}\n`);
process.stdin.on("end", () => void discovery.close());
process.stdin.resume();
