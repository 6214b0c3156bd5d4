"""Dynamo's own radix tree under the load of kv-index.ts, through its Python binding; kv-index.ts runs this and prints it.

128 workers, each with 20 of 200 chains of 100 blocks: events as JSON, as the binding takes them (made beforehand, parsed by
the tree), then lookups one after the other. Prints one JSON object; times of CPU are of the whole process.
"""

import json
import random
import time

from dynamo.llm import RadixTree

WORKERS, CHAINS, BLOCKS, CHAINS_PER_WORKER, LOOKUPS = 128, 200, 100, 20, 3_000


def stored(event_id, chain):
    blocks = [{"block_hash": block, "tokens_hash": block} for block in chain]
    return json.dumps({"event_id": event_id, "data": {"stored": {"parent_hash": None, "blocks": blocks}}}).encode()


def resident_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))


rng = random.Random(42)
chains = [[rng.getrandbits(64) for _ in range(BLOCKS)] for _ in range(CHAINS)]
events = [
    (worker, stored(i, chain))
    for worker in range(WORKERS)
    for i, chain in enumerate(rng.sample(chains, CHAINS_PER_WORKER))
]
memberships = len(events) * BLOCKS
tree = RadixTree()
before_kib, before_s = resident_kib(), time.process_time()
for worker, event in events:
    tree.apply_event(worker, event)
# A lookup waits for the events before it.
tree.find_matches(chains[0])
applied_s = time.process_time() - before_s
grown_kib = resident_kib() - before_kib
lookup_us = []
for i in range(LOOKUPS):
    start = time.perf_counter()
    tree.find_matches(chains[i % CHAINS])
    lookup_us.append((time.perf_counter() - start) * 1e6)
lookup_us.sort()
print(
    json.dumps(
        {
            "millionPerCpuSecond": memberships / applied_s / 1e6,
            "p50Us": lookup_us[LOOKUPS // 2],
            "p99Us": lookup_us[LOOKUPS * 99 // 100],
            "memberships": memberships,
            "bytesEach": grown_kib * 1024 / memberships,
        }
    )
)
