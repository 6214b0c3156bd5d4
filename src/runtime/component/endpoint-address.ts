import { DynamoError } from "../../errors/index.ts";

/**
 * Where a service is found: namespace (a cluster or tenant), component (a pool of like workers), endpoint (one thing they
 * answer). Written `namespace.component.endpoint`, with scheme `dyn://namespace.component.endpoint`, as Dynamo does. Names
 * are letters, digits, `-` and `_`, 1 to 63 characters, and mean what they say: case counts.
 */
export interface EndpointAddress {
  readonly namespace: string;
  readonly component: string;
  readonly endpoint: string;
}

const NAME = /^[A-Za-z0-9_-]{1,63}$/;
const SCHEME = "dyn://";

export function isAddressName(name: string): boolean {
  return NAME.test(name);
}

/** Throws `invalid-config` with the part that is wrong. */
export function checkEndpointAddress(address: EndpointAddress): void {
  checkName("namespace", address.namespace);
  checkName("component", address.component);
  checkName("endpoint", address.endpoint);
}

export function checkName(part: keyof EndpointAddress, name: string): void {
  if (isAddressName(name)) return;
  throw new DynamoError(
    "invalid-config",
    `${part}: expected 1 to 63 letters, digits, - or _, got ${JSON.stringify(name.slice(0, 80))}`,
    { param: part },
  );
}

/** `namespace.component.endpoint`. */
export function formatEndpoint(address: EndpointAddress): string {
  checkEndpointAddress(address);
  return `${address.namespace}.${address.component}.${address.endpoint}`;
}

/** `dyn://namespace.component.endpoint`. */
export function formatDynAddress(address: EndpointAddress): string {
  return SCHEME + formatEndpoint(address);
}

/** Reads `dyn://namespace.component.endpoint`; the scheme may be left out. Throws `invalid-config`. */
export function parseDynAddress(text: string): EndpointAddress {
  const parts = (text.startsWith(SCHEME) ? text.slice(SCHEME.length) : text).split(".");
  const [namespace, component, endpoint] = parts;
  if (parts.length !== 3 || namespace === undefined || component === undefined || endpoint === undefined) {
    throw new DynamoError(
      "invalid-config",
      `endpoint address: expected dyn://namespace.component.endpoint, got ${JSON.stringify(text.slice(0, 200))}`,
    );
  }
  const address = { namespace, component, endpoint };
  checkEndpointAddress(address);
  return address;
}
