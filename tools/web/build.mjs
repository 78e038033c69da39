// Makes the files in server/web/ that browsers are given from those in server/web/src/: bundled, and without comments.
// node tools/web/build.mjs TOOLS [DIRECTORY]: with the packages in TOOLS/node_modules, into DIRECTORY (server/web).

import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const [tools, directory] = process.argv.slice(2);
const web = join(dirname(fileURLToPath(import.meta.url)), "../../server/web");
const { build } = createRequire(join(resolve(tools), "x.js"))("esbuild");

// Scripts that are no modules find out otherwise where they came from.
const classic = { "import.meta.url": "undefined" };
const FILES = [
  ["client.js", "index.js", { format: "esm" }],
  ["client.cjs", "index.js", { format: "cjs", define: classic }],
  ["client.iife.js", "index.js", { format: "iife", globalName: "statuswire", define: classic }],
];

for (const [name, source, options] of FILES) {
  await build({
    absWorkingDir: web,
    entryPoints: [`src/${source}`],
    outfile: join(resolve(directory ?? web), name),
    bundle: true,
    minify: true,
    target: "es2021",
    legalComments: "none",
    logLevel: "warning",
    external: ["react", "./client.js"],
    ...options,
  });
}
