import assert from "node:assert/strict";
import { test } from "node:test";
import { RecordLinks } from "./record-links.ts";

test("record links: any number of children is counted, up and down, and the parent stays", () => {
  const links = new RecordLinks(1_000);
  links.ensureRecords(10);
  const parent = 2 ** 26 - 1;
  links.start(3, parent, 7, 0xffffffff);
  for (const most of [1, 62, 63, 64, 200]) {
    for (let count = 0; count < most; count++) {
      assert.equal(links.hasChildren(3), count > 0);
      links.addChild(3);
    }
    for (let count = most; count > 0; count--) {
      assert.equal(links.hasChildren(3), true);
      assert.equal(links.parentOf(3), parent);
      links.removeChild(3);
    }
    assert.equal(links.hasChildren(3), false);
  }
  assert.deepEqual([links.localLoOf(3), links.localHiOf(3)], [7, 0xffffffff]);
});

test("record links: a record that is used again starts without children", () => {
  const links = new RecordLinks(1_000);
  links.ensureRecords(10);
  links.start(1, 0, 0, 0);
  links.start(2, 1, 0, 0);
  links.addChild(1);
  links.removeChild(1);
  links.start(1, 2, 0, 0);
  assert.deepEqual([links.parentOf(1), links.hasChildren(1)], [2, false]);
});
