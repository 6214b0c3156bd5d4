import { testSeeds } from "./standard-seeds.ts";

testSeeds(1, 500);
