// The package eventsource: node eventsource.mjs PACKAGES URL NAMES, the last as JSON.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

import { listen } from "./listening.mjs";

const [packages, url, names] = process.argv.slice(2);
const { EventSource } = await import(pathToFileURL(createRequire(`${packages}/`).resolve("eventsource")));
console.log(JSON.stringify(await listen((at) => new EventSource(at), url, JSON.parse(names))));
