// Makes the files in server/web/ that browsers are given from those in server/web/src/: bundled, and made small.
// node tools/web/build.mjs TOOLS [DIRECTORY]: with the packages in TOOLS/node_modules, into DIRECTORY (server/web).

import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const [tools, directory] = process.argv.slice(2);
const web = join(dirname(fileURLToPath(import.meta.url)), "../../server/web");
const packages = createRequire(join(resolve(tools), "tools.js"));
const { build } = packages("esbuild");
const { minify } = packages("terser");

// Properties that are nobody's business but the client's own: they get short names, the same in all files.
const PRIVATE =
  "StatusError alone apply bearer changed complain connection controller cursor doubtful end expect fail feed feeds " +
  "fetch final fresh heard heardAt http index key kind known learned listen listeners liveAt locate names options probe query refuse relay renewIn " +
  "renewed shown silence start stop store synced told topics vouch wanted";

// Numbers with names become numbers: neither of the two takes them for constants once files are joined.
const numbers = {
  name: "numbers",
  setup: ({ onLoad }) =>
    onLoad({ filter: /[/\\]src[/\\]\w+\.js$/ }, ({ path }) => {
      let contents = readFileSync(path, "utf8");
      for (const [whole, name, value] of contents.matchAll(/^const ([A-Z_]+) = ([\d_.]+);/gm)) {
        contents = contents.replace(whole, "").replace(new RegExp(`\\b${name}\\b`, "g"), value);
      }
      return { contents };
    }),
};

const client = { mangleProps: new RegExp(`^(${PRIVATE.replaceAll(" ", "|")})$`) };
const FILES = [
  ["client.js", "index.js", client],
  ["share.js", "share.js", client],
  ["react.js", "react.js"],
  ["job-progress.js", "job-progress.js"],
];

let mangleCache = {};
for (const [name, source, options] of FILES) {
  const bundled = await build({
    absWorkingDir: web,
    entryPoints: [`src/${source}`],
    bundle: true,
    minify: true,
    write: false,
    format: "esm",
    target: "es2022",
    external: ["react", "./client.js", "./share.js"],
    logLevel: "warning",
    plugins: [numbers],
    ...(options && { ...options, mangleCache }),
  });
  mangleCache = bundled.mangleCache ?? mangleCache;
  const small = await minify(bundled.outputFiles[0].text, {
    module: true,
    // What is unsafe are texts of objects with two different ones: we have none. With reduce_vars this terser takes
    // variables that are set later for constants.
    compress: { hoist_funs: true, unsafe: true, reduce_vars: false },
    format: { comments: false },
  });
  write(name, small.code);
  if (name === "client.js") writeClassic(small.code);
}

function write(name, code) {
  writeFileSync(join(resolve(directory ?? web), name), `${code}\n`);
}

/** The same for those who cannot load modules: how it begins and ends is all that is different. */
function writeClassic(code) {
  const [ending, names] = /export\{(.*)\};?$/.exec(code);
  const exports = names.split(",").map((one) => one.split(" as "));
  // Scripts that are no modules find out otherwise where they came from.
  const body = code.slice(0, -ending.length).replace("import.meta.url", "globalThis.document?.currentScript?.src");
  write("client.cjs", `"use strict";${body}${exports.map(([own, name]) => `exports.${name}=${own};`).join("")}`);
  // To one from elsewhere browsers do not say relative to what it imports.
  const [, here] = /(\w+)=import\.meta\.url/.exec(code);
  const script = body.replace('import("./share.js")', `import(new URL("share.js",${here}||location))`);
  // In this order it is a byte less, which is what there was to spare.
  write("client.iife.js", `var statuswire=(()=>{${script}return{${exports.reverse().map(([own, name]) => `${name}:${own}`)}}})()`);
}
