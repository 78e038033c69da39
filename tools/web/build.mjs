// Makes the files in server/web/ that browsers are given from those in server/web/src/: bundled, and made small.
// node tools/web/build.mjs TOOLS [DIRECTORY]: with the packages in TOOLS/node_modules, into DIRECTORY (server/web).

import { writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const [tools, directory] = process.argv.slice(2);
const web = join(dirname(fileURLToPath(import.meta.url)), "../../server/web");
const packages = createRequire(join(resolve(tools), "tools.js"));
const { build } = packages("esbuild");
const { minify } = packages("terser");

// Scripts that are no modules find out otherwise where they came from.
const classic = { define: { "import.meta.url": "undefined" } };
const FILES = [
  ["client.js", "index.js", { format: "esm" }],
  ["client.cjs", "index.js", { format: "cjs", ...classic }],
  ["client.iife.js", "index.js", { format: "iife", globalName: "statuswire", ...classic }],
  ["share.js", "share.js", { format: "esm" }],
  ["react.js", "react.js", { format: "esm" }],
  ["job-progress.js", "job-progress.js", { format: "esm" }],
];

for (const [name, source, options] of FILES) {
  const bundled = await build({
    absWorkingDir: web,
    entryPoints: [`src/${source}`],
    bundle: true,
    write: false,
    target: "es2022",
    external: ["react", "./client.js", "./share.js"],
    logLevel: "warning",
    ...options,
  });
  const small = await minify(bundled.outputFiles[0].text, {
    module: options.format === "esm",
    toplevel: true,
    ecma: 2020,
    compress: { passes: 5, unsafe_arrows: true, unsafe_methods: true },
    mangle: { reserved: ["statuswire"] },
    format: { comments: false },
  });
  writeFileSync(join(resolve(directory ?? web), name), small.code + "\n");
}
