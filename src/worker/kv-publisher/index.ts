export { KvPublisher, type KvPublisherOptions } from "./kv-publisher.ts";
